"""What calls in several threads switch on for one object: the first switches it on, the last one off."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Held while something is switched on or off, and while it is decided whether to: never while a model computes a text.
SWITCHING = threading.RLock()

_holders: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def is_held(owner: object) -> bool:
    """Whether a call holds what was switched on for `owner`."""
    return _holders.get(owner, 0) > 0


@contextmanager
def holding(owner: object, switch_on: Callable[[], None], switch_off: Callable[[], None]) -> Iterator[None]:
    """Within it, and within every other one for `owner`, it is switched on."""
    with SWITCHING:
        if not is_held(owner):
            switch_on()
        _holders[owner] = _holders.get(owner, 0) + 1
    try:
        yield
    finally:
        with SWITCHING:
            _holders[owner] -= 1
            if not is_held(owner):
                switch_off()
