"""Trains a draft for a target on the target's own answers: stage 1 EAGLE-3, stage 2 ConFu from it. Runs under
`accelerate launch` as any Trainer script.

    python examples/train.py --stage eagle3 --data answers.jsonl --output_dir eagle3 --max_steps 1000 --bf16
    python examples/train.py --stage confu --init_from eagle3 --data answers.jsonl --output_dir confu --max_steps 1000
    --bf16

`--init_from` a draft of the stage's own kind goes on training it (a ConFu pair with its adapter): so does the EAGLE-3
baseline get the same number of steps. All of `TrainingArguments` can be given. With `--resume_from_checkpoint auto` an
interrupted run goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, field

import torch
from _smollm2 import load_target
from datasets import Dataset
from peft import inject_adapter_in_model
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from confu_hf import ConFuAdapterConfig, ConFuAssistant, ConFuConfig
from confu_hf.target.geometry import attention_geometry
from confu_hf.target.soft_prompts import soft_prompt_key_values
from confu_hf.training.data import ConversationCollator, frequent_tokens, load_conversations
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.store import FeatureStore
from confu_hf.training.trainer import ConFuTrainer
from confu_hf.training.warm_start import warm_start_from_eagle3, warm_start_from_target


@dataclass
class ScriptArguments:
    data: list[str] = field(metadata={"help": "files with `messages`, answers written by the target"})
    stage: str = field(default="eagle3", metadata={"help": "eagle3 or confu", "choices": ["eagle3", "confu"]})
    target: str | None = field(default=None, metadata={"help": "Hub id or folder; default SmolLM2-135M-Instruct"})
    target_dtype: str = field(default="bfloat16", metadata={"help": "dtype of the frozen target"})
    init_from: str | None = field(default=None, metadata={"help": "EAGLE-3 draft or ConFu pair to start from"})
    draft_vocab_size: int = 8192
    max_length: int = field(default=768, metadata={"help": "tokens per sequence, prompt included"})
    feature_store: str | None = field(default=None, metadata={"help": "folder to keep target features in"})
    store_caches: bool = field(default=False, metadata={"help": "keep the target's keys and values there, for confu"})
    held_out: int = field(default=48, metadata={"help": "sequences kept out of training, for the accepted length"})
    eval_data: list[str] | None = field(default=None, metadata={"help": "files to hold out instead"})
    muon: bool = field(default=True, metadata={"help": "Muon for the draft's matrices; needs torch>=2.9"})
    adapter_learning_rate: float | None = field(default=None, metadata={"help": "of soft prompts and experts"})
    num_virtual_tokens: int = 16
    num_experts: int = 8
    num_experts_per_token: int = 2


def build_draft(arguments: ScriptArguments, target, train_rows, end_ids: list[int]) -> ConFuAssistant:
    """The draft of this stage: from the target's own last layers, or from an EAGLE-3 checkpoint."""
    contemplate = arguments.stage == "confu"
    source = ConFuAssistant.from_pretrained(arguments.init_from, dtype=torch.float32) if arguments.init_from else None
    if source is not None and source.config.contemplate == contemplate:
        return source.attach(target)  # with its adapter, if it has one
    if source is not None:
        config = ConFuConfig.from_dict({**source.config.to_dict(), "contemplate": True})
        draft = ConFuAssistant(config)
        warm_start_from_eagle3(draft, source)
        return draft
    size = min(arguments.draft_vocab_size, target.config.vocab_size)
    config = ConFuConfig.from_target_config(target.config, draft_vocab_size=size, contemplate=contemplate)
    draft = ConFuAssistant(config)
    token_ids, coverage = frequent_tokens(train_rows, config.vocab_size, size, always=end_ids)
    draft.set_draft_vocabulary(token_ids)
    print(f"draft vocabulary: {size} tokens cover {coverage:.1%} of the answers")
    print("started from the target:", ", ".join(warm_start_from_target(draft, target)))
    return draft


def add_adapter(arguments: ScriptArguments, target, draft: ConFuAssistant) -> None:
    """Soft prompts and experts on the target; soft prompts start as the keys and values of random vocabulary
    tokens."""
    layers, kv_heads, head_dim = attention_geometry(target.config)
    config = ConFuAdapterConfig(
        num_virtual_tokens=arguments.num_virtual_tokens,
        num_experts=arguments.num_experts,
        num_experts_per_token=arguments.num_experts_per_token,
        target_hidden_size=draft.config.target_hidden_size,
        target_num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        target_layer_ids=list(draft.config.target_layer_ids),
    )
    inject_adapter_in_model(config, target)
    layer = target.confu
    table = target.get_input_embeddings().weight
    with torch.no_grad():
        ids = draft.draft_token_ids[torch.randperm(draft.config.draft_vocab_size)[: config.num_virtual_tokens]]
        layer.prompt_weight().copy_(soft_prompt_key_values(target, table[ids]))
        layer.confu_experts["default"].weight.add_(table[draft.draft_token_ids].mean(0))
    draft.attach(target)


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


def open_store(arguments: ScriptArguments, target, draft: ConFuAssistant, *parts: Dataset) -> FeatureStore:
    """Target features on disk. They depend on the sequences, the target, its layers and the draft's vocabulary."""
    sequences = sorted((row["index"], row["input_ids"]) for part in parts for row in part)
    content = hashlib.sha256(repr(sequences).encode()).hexdigest()[:16]
    vocabulary = hashlib.sha256(draft.draft_token_ids.numpy().tobytes()).hexdigest()[:16]
    name = arguments.target or "smollm2-135m-instruct"
    fingerprint = f"{name} {arguments.target_dtype} {draft.config.target_layer_ids} {vocabulary} {content}"
    shape = attention_geometry(target.config) if arguments.store_caches else None
    lengths = [len(input_ids) for _, input_ids in sequences]
    return FeatureStore(arguments.feature_store, lengths, target.config.hidden_size, fingerprint, shape)


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, ConFuTrainingObjective, TrainingArguments))
    arguments, objective, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    target, tokenizer = load_target(arguments.target, arguments.target_dtype)
    ends = target.generation_config.eos_token_id
    end_ids = list(ends) if isinstance(ends, list) else [ends]
    rows, held_out = load_rows(arguments, tokenizer)
    draft = build_draft(arguments, target, rows, end_ids)
    if draft.config.contemplate:
        if draft.target is None:
            add_adapter(arguments, target, draft)
        target.confu.float()
    store = open_store(arguments, target, draft, rows, held_out) if arguments.feature_store else None
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
    )
    checkpoint = training.resume_from_checkpoint
    if checkpoint == "auto":
        checkpoint = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    print(trainer.evaluate())


if __name__ == "__main__":
    sys.exit(main())
