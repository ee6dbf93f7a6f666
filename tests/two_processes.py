"""Run by test_processes.py, once per process: a few steps of training, and what came out of them as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from accelerate import PartialState  # noqa: E402
from tiny_models import tiny_llama  # noqa: E402
from tiny_pairs import conversations, tiny_pair  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from confu_hf.training.data import ConversationCollator  # noqa: E402
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective  # noqa: E402
from confu_hf.training.sharding import shard_target  # noqa: E402
from confu_hf.training.trainer import ConFuTrainer  # noqa: E402

SEQUENCES = [(3, 12), (4, 30), (3, 9), (5, 16), (4, 22), (3, 15), (4, 11), (3, 27)]
STEPS = 3


def train(
    folder: Path, *, batch_size: int, accumulation: int, contemplate: bool = False, shard: bool = False, **objective
) -> dict[str, list[float]]:
    """Losses, and the sum of every trained weight, in float64."""
    target = tiny_llama()
    if shard:
        PartialState(cpu=True)  # as TrainingArguments do
        shard_target(target)
    pair = tiny_pair(target, contemplate=contemplate, **({"lora_rank": 2} if contemplate else {}))
    module = ConFuForTraining(target, pair, ConFuTrainingObjective(ttt_steps=3, **objective))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_strategy="no",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        train_sampling_strategy="group_by_length",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = conversations(*SEQUENCES)
    trainer = ConFuTrainer(module, arguments, train_dataset=rows, data_collator=ConversationCollator(0))
    trainer.train()
    # What was logged is rounded.
    history = trainer.state.log_history
    return {
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "tokens": [entry["answer_tokens_seen"] for entry in history if "answer_tokens_seen" in entry],
        "accepted": [entry["train_accepted_length"] for entry in history if "train_accepted_length" in entry],
        "weights": [p.detach().abs().sum().item() for p in module.parameters() if p.requires_grad],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = train(folder, batch_size=2, accumulation=1, **json.loads(sys.argv[2]))
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    # All is written: threads of gloo that still run would now and then abort an interpreter that takes itself apart.
    os._exit(0)
