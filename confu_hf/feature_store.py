"""What the frozen target says about each training sequence, kept on disk: from the second epoch on, EAGLE-3 training
needs no target.

Per position `4 d + 2` numbers of two bytes: the features, the last hidden state (from which the draft-vocabulary
logits follow) and the target's
likeliest token. That is 4.6 kB a token for `d = 576` and 33 kB for `d = 4096`: worth it where the target is the slow
part and the disk is large. ConFu's stage
cannot use it, its contemplate tokens need the target's cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class FeatureStore:
    """Memory-mapped rows per sequence, filled as training goes.

    Args:
        folder: where the files are, or will be.
        lengths: tokens of every sequence, by index.
        width: `d` of the target.
        fingerprint: what else the content depends on (target, dtype, draft vocabulary, layers); another one is
            refused.

    Raises:
        ValueError: the folder holds features of other data or of another target.
    """

    def __init__(self, folder: str | Path, lengths: list[int], width: int, fingerprint: str):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"lengths_sum": sum(lengths), "sequences": len(lengths), "width": width, "fingerprint": fingerprint}
        self._check_identity(folder / "identity.json", identity)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        total = int(self.starts[-1])
        self.states = self._open(folder / "states.bin", np.int16, (total, 4 * width))  # bit patterns of bfloat16
        self.choices = self._open(folder / "choices.bin", np.int32, (total,))
        self.known = self._open(folder / "known.bin", np.uint8, (len(lengths),))

    @staticmethod
    def _check_identity(path: Path, identity: dict[str, int | str]) -> None:
        if path.exists():
            found = json.loads(path.read_text())
            if found != identity:
                raise ValueError(
                    f"{path.parent} holds target features of {found}, expected {identity}. "
                    "Give --feature_store another folder, or delete this one."
                )
        path.write_text(json.dumps(identity))

    @staticmethod
    def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        return np.memmap(path, dtype=dtype, mode="r+" if path.exists() else "w+", shape=shape)

    def holds(self, index: Tensor) -> bool:
        """Whether all sequences `index` `(B,)` are known."""
        return bool(self.known[index.cpu().numpy()].all())

    def write(self, index: Tensor, attention_mask: Tensor, states: Tensor, choices: Tensor) -> None:
        """Keep `states` `(B, N, 4 d)`, rounded to bfloat16, and `choices` `(B, N)` long of right-padded sequences
        `index` `(B,)`."""
        for row, (sequence, length) in enumerate(zip(index.tolist(), attention_mask.sum(-1).tolist(), strict=True)):
            part = slice(self.starts[sequence], self.starts[sequence] + length)
            self.states[part] = states[row, :length].to("cpu", torch.bfloat16).view(torch.int16).numpy()
            self.choices[part] = choices[row, :length].cpu().numpy()
            self.known[sequence] = 1

    def read(self, index: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`states` `(B, length, 4 d)` bfloat16 and `choices` `(B, length)` long, on the CPU, zeros behind the end of
        a sequence."""
        states = torch.zeros(len(index), length, self.states.shape[1], dtype=torch.bfloat16)
        choices = torch.zeros(len(index), length, dtype=torch.long)
        for row, sequence in enumerate(index.tolist()):
            part = slice(self.starts[sequence], self.starts[sequence + 1])
            count = part.stop - part.start
            states[row, :count] = torch.from_numpy(np.array(self.states[part])).view(torch.bfloat16)
            choices[row, :count] = torch.from_numpy(self.choices[part].astype(np.int64))
        return states, choices
