"""Trains a draft for a target on the target's own answers: stage 1 EAGLE-3, stage 2 ConFu from it.

    python examples/train.py --stage eagle3 --data answers.jsonl --output_dir eagle3 --max_steps 1000
    python examples/train.py --stage confu --init_from eagle3 --data answers.jsonl --output_dir confu --max_steps 1000

Runs under `accelerate launch` as any Trainer script. `--init_from` a draft of the stage's own kind goes on training it (a
ConFu pair with its adapter): so does the EAGLE-3 baseline get the same number of steps. All of `TrainingArguments` can be
given; `--bf16` pays where the processor multiplies bfloat16. With `--resume_from_checkpoint auto` an interrupted run goes
on exactly where its last checkpoint was.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import torch
from _smollm2 import load_target
from datasets import Dataset
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from confu_hf import ConFuAssistant
from confu_hf.options import TreeOptions
from confu_hf.training.data import ConversationCollator, load_conversations
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.optimizer import product_dtype
from confu_hf.training.pair import AdapterShape, DraftShape, add_adapter, confu_from_eagle3, fresh_draft, open_store
from confu_hf.training.trainer import ConFuTrainer


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "files with `messages`, answers written by the target"})
    stage: str = field(default="eagle3", metadata={"help": "eagle3 or confu", "choices": ["eagle3", "confu"]})
    target: str | None = field(default=None, metadata={"help": "Hub id or folder; default SmolLM2-135M-Instruct"})
    target_dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the frozen target; auto: bfloat16 where the processor multiplies it"},
    )
    init_from: str | None = field(default=None, metadata={"help": "EAGLE-3 draft or ConFu pair to start from"})
    max_length: int = field(default=768, metadata={"help": "tokens per sequence, prompt included"})
    feature_store: str | None = field(default=None, metadata={"help": "folder to keep target features in"})
    store_caches: bool = field(default=False, metadata={"help": "keep the target's keys and values there, for confu"})
    held_out: int = field(default=48, metadata={"help": "sequences kept out of training, for the accepted length"})
    trees: bool = field(
        default=True, metadata={"help": "count accepted lengths on held-out greedy answers in trees, by task"}
    )
    tree_tokens: int = field(default=30, metadata={"help": "drafted nodes of these trees"})
    tree_depth: int = field(default=7, metadata={"help": "their depth"})
    tree_top_k: int = field(default=10, metadata={"help": "nodes expanded per layer"})
    eval_data: list[str] | None = field(default=None, metadata={"help": "files to hold out instead"})
    muon: bool = field(default=True, metadata={"help": "Muon for the draft's matrices"})
    adapter_learning_rate: float | None = field(default=None, metadata={"help": "of soft prompts and experts"})
    lora_learning_rate: float | None = field(default=None, metadata={"help": "of the gated LoRA (--lora_rank)"})


def build_pair(
    arguments: ScriptArguments, draft_shape: DraftShape, adapter_shape: AdapterShape, target, rows, end_ids: list[int]
) -> ConFuAssistant:
    """The draft of this stage, from the target's own last layers or from a checkpoint; for ConFu with its adapter."""
    contemplate = arguments.stage == "confu"
    source = ConFuAssistant.from_pretrained(arguments.init_from, dtype=torch.float32) if arguments.init_from else None
    if source is not None and source.config.contemplate == contemplate:
        return source.attach(target)  # with its adapter, if it has one
    if source is not None:
        draft = confu_from_eagle3(ConFuAssistant, source)
    else:
        fresh = fresh_draft(ConFuAssistant, draft_shape, target, rows, contemplate=contemplate, always=end_ids)
        draft = fresh.draft
        print(f"draft vocabulary: {draft.config.draft_vocab_size} tokens cover {fresh.coverage:.1%} of the answers")
        print("started from the target:", ", ".join(fresh.from_target))
    if contemplate:
        add_adapter(target, draft, adapter_shape)
        draft.attach(target)
    return draft


def load_rows(arguments: ScriptArguments, tokenizer) -> tuple[Dataset, Dataset]:
    """Sequences to train on and to hold out, numbered through."""
    options = {"max_length": arguments.max_length, "eos_token_id": tokenizer.eos_token_id}
    rows = load_conversations(arguments.data, tokenizer, **options)
    if arguments.eval_data is None:
        split = rows.train_test_split(test_size=arguments.held_out, seed=0)
        return split["train"], split["test"]
    held_out = load_conversations(arguments.eval_data, tokenizer, **options)
    numbers = range(len(rows), len(rows) + len(held_out))
    return rows, held_out.remove_columns("index").add_column("index", numbers)


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DraftShape, AdapterShape, ConFuTrainingObjective, TrainingArguments))
    arguments, draft_shape, adapter_shape, objective, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    dtype = product_dtype(training.device) if arguments.target_dtype == "auto" else arguments.target_dtype
    target, tokenizer = load_target(arguments.target, dtype)
    ends = target.generation_config.eos_token_id
    end_ids = list(ends) if isinstance(ends, list) else [ends]
    rows, held_out = load_rows(arguments, tokenizer)
    draft = build_pair(arguments, draft_shape, adapter_shape, target, rows, end_ids)
    if draft.config.contemplate:
        target.confu.float()
    store = None
    if arguments.feature_store:
        name = arguments.target or "smollm2-135m-instruct"
        store = open_store(
            arguments.feature_store, target, draft, rows, held_out, name=name, store_caches=arguments.store_caches
        )
    tree = TreeOptions(total_tokens=arguments.tree_tokens, depth=arguments.tree_depth, top_k=arguments.tree_top_k)
    training.train_sampling_strategy = "group_by_length"
    training.label_names = ["labels"]
    trainer = ConFuTrainer(
        ConFuForTraining(target, draft, objective, store),
        training,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=ConversationCollator(target.generation_config.pad_token_id or end_ids[0]),
        muon=arguments.muon,
        adapter_learning_rate=arguments.adapter_learning_rate,
        lora_learning_rate=arguments.lora_learning_rate,
        replay=draft.replay(tree) if arguments.trees else None,
    )
    checkpoint = training.resume_from_checkpoint
    if checkpoint == "auto":
        checkpoint = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    print(trainer.evaluate())


if __name__ == "__main__":
    sys.exit(main())
