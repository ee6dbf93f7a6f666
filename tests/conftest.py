"""Set up for all tests: offline, one thread (the models are tiny), and `tests/` importable for `tiny_models`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402 - the environment is read on import

torch.set_num_threads(1)
