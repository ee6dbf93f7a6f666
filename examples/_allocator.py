"""Restarts a script with an allocator that keeps freed memory. Standard library only: runs before torch."""

from __future__ import annotations

import os
import platform
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def keep_freed_memory() -> None:
    """Restart this process with glibc told to keep freed memory. Does nothing elsewhere, or if already set.

    Decoding frees and allocates tensors of a few megabytes at every step. By default glibc hands such blocks back to
    the kernel and gets them again as zeroed pages; on a CPU the page faults can take longer than the matrix products,
    for plain `generate` most of all (its cache is copied at every step), so a comparison without this would flatter
    ConFu. glibc reads these variables only when a process starts: hence the restart.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
