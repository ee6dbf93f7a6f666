"""`ConFuTrainer`: Hugging Face's `Trainer` around [`ConFuForTraining`]; saves draft and adapter as the repository
layout that users load.

Everything else (schedules, mixed precision, accelerate, checkpoints, resuming) is the `Trainer`'s own.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import EvalPrediction, Trainer

from .training import ConFuForTraining

ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"


def acceptance_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the trainer: chain accepted length (bonus included) and the share of right guesses per
    depth."""
    accepted, correct = prediction.predictions
    totals = accepted.sum(0)
    per_depth = correct.sum(0)
    metrics = {"accepted_length": float(totals[0] / max(totals[1], 1))}
    for depth, (right, guesses) in enumerate(per_depth, start=1):
        metrics[f"accuracy_depth_{depth}"] = float(right / max(guesses, 1))
    return metrics


class ConFuTrainer(Trainer):
    """`Trainer` for [`ConFuForTraining`]: logs the accepted length while it trains, writes draft and adapter apart,
    resumes exactly.

    Only the draft and the adapter are written: the target is frozen and is named in the card.
    """

    def __init__(self, model: ConFuForTraining, *args: Any, **kwargs: Any):
        kwargs.setdefault("compute_metrics", acceptance_metrics)
        super().__init__(model, *args, **kwargs)
        self._window = np.zeros(3)  # summed accepted lengths, their rows, answer tokens drafted for
        self._tokens_seen = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if model.training:
            accepted = outputs["accepted"].detach().sum(0).tolist()
            self._window += (*accepted, outputs["correct"][:, 0, 1].sum().item())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._window[1]:
            self._tokens_seen += self._window[2]
            logs["train_accepted_length"] = round(self._window[0] / self._window[1], 3)
            logs["answer_tokens_seen"] = int(self._tokens_seen)
            self._window[:] = 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        module = self.accelerator.unwrap_model(self.model)
        module.draft.save_pretrained(output_dir)
        if module.draft.config.contemplate:
            folder = os.path.join(output_dir, ADAPTER_FOLDER)
            os.makedirs(folder, exist_ok=True)
            weights = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(module.target).items()}
            save_file(weights, os.path.join(folder, ADAPTER_FILE), metadata={"format": "pt"})
            module.target.peft_config["default"].save_pretrained(folder)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        module = self.accelerator.unwrap_model(model or self.model)
        module.draft.load_state_dict(load_file(os.path.join(resume_from_checkpoint, "model.safetensors")))
        if module.draft.config.contemplate:
            weights = load_file(os.path.join(resume_from_checkpoint, ADAPTER_FOLDER, ADAPTER_FILE))
            set_peft_model_state_dict(module.target, weights)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
