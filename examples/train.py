"""Trains a draft for a target on the target's own answers: all of it in a given time, or stage by stage.

    python examples/train.py --recipe confu --max_minutes 60 --output_dir runs/pair

lets the target answer prompts (`--prompts`; without, a few hundred of the project's own), trains EAGLE-3, ConFu from it and
EAGLE-3's twin for as many steps, and compares them in trees; started again it goes on where it was (confu_hf/training/recipe.py).

    python examples/train.py --stage eagle3 --data answers.jsonl --output_dir eagle3 --max_steps 1000
    python examples/train.py --stage confu --init_from eagle3 --data answers.jsonl --output_dir confu --max_steps 1000

Runs under `accelerate launch` as any Trainer script. `--init_from` a draft of the stage's own kind goes on training it (a
ConFu pair with its adapter): so does the EAGLE-3 baseline get the same number of steps. All of `TrainingArguments` can be
given; `--bf16` pays where the processor multiplies bfloat16. With `--resume_from_checkpoint auto` an interrupted run goes
on exactly where its last checkpoint was.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator
    import _script

    _script.begin("datasets")
    _allocator.keep_freed_memory()

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _measure import environment, write_json
from _prompts import read_prompts, read_questions, user_texts
from _smollm2 import load_target
from _templates import template_prompts
from datasets import Dataset
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.utils import logging

from confu_hf import ConFuAssistant
from confu_hf.acceleration.attention import grouped_queries
from confu_hf.acceleration.packing import packed_linears
from confu_hf.errors import refusal
from confu_hf.options import TreeOptions
from confu_hf.training.answers import Question
from confu_hf.training.budget import Budget, StageClock
from confu_hf.training.data import ConversationCollator, load_conversations, split_held_out
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.optimizer import product_dtype
from confu_hf.training.overlap import OverlapIndex
from confu_hf.training.pair import AdapterShape, DraftShape, open_store, starting_pair
from confu_hf.training.recipe import SHARES, UNLIMITED_STEPS, Recipe, RecipeOptions, StageCallback, summary
from confu_hf.training.sharding import shard_target
from confu_hf.training.trainer import ConFuTrainer


@dataclass
class ScriptArguments:
    data: list[str] | None = field(
        default=None, metadata={"help": "files with `messages`, answers written by the target"}
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": "all stages in --max_minutes, with settings of its own", "choices": list(SHARES)},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "what a recipe (default 15) or a stage (default: no limit) may take, interruptions left out"
        },
    )
    prompts: list[str] | None = field(default=None, metadata={"help": "what a recipe has answered, as regenerate.py"})
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "benchmarks: prompts that share text are left out"}
    )
    stage: str = field(default="eagle3", metadata={"help": "eagle3 or confu", "choices": ["eagle3", "confu"]})
    target: str | None = field(default=None, metadata={"help": "Hub id or folder; default SmolLM2-135M-Instruct"})
    target_dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the frozen target; auto: bfloat16 where the processor multiplies it"},
    )
    shard_target: bool = field(
        default=False, metadata={"help": "split the target's layers among the processes: it does not fit one device"}
    )
    init_from: str | None = field(default=None, metadata={"help": "EAGLE-3 draft or ConFu pair to start from"})
    adapter_from: str | None = field(
        default=None, metadata={"help": "ConFu pair whose adapter is taken, where --init_from is an EAGLE-3 draft"}
    )
    max_length: int = field(default=768, metadata={"help": "tokens per sequence, prompt included"})
    feature_store: str | None = field(default=None, metadata={"help": "folder to keep target features in"})
    store_caches: bool = field(default=False, metadata={"help": "keep the target's keys and values there, for confu"})
    store_limit: float | None = field(
        default=None, metadata={"help": "the most gigabytes for --feature_store; default nine tenths of the free disk"}
    )
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
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "of the adapter's router; default --adapter_learning_rate"}
    )
    lora_learning_rate: float | None = field(default=None, metadata={"help": "of the gated LoRA (--lora_rank)"})


def load_rows(arguments: ScriptArguments, tokenizer) -> tuple[Dataset, Dataset]:
    """Sequences to train on and to hold out, numbered through."""
    options = {"max_length": arguments.max_length, "eos_token_id": tokenizer.eos_token_id}
    rows = load_conversations(arguments.data, tokenizer, **options)
    if arguments.eval_data is None:
        return split_held_out(rows, arguments.held_out)
    held_out = load_conversations(arguments.eval_data, tokenizer, **options)
    numbers = range(len(rows), len(rows) + len(held_out))
    return rows, held_out.remove_columns("index").add_column("index", numbers)


def run_recipe(
    arguments: ScriptArguments, adapter_shape: AdapterShape, training: TrainingArguments, target, tokenizer
) -> None:
    """Everything in a given time."""
    if training.world_size > 1:
        raise refusal(
            "--recipe",
            got=f"{training.world_size} processes",
            expected="one: each has a clock of its own",
            fix="Run the stages one by one, as examples/training.md shows.",
        )
    benchmark = OverlapIndex(read_questions(arguments.exclude))
    prompts = template_prompts() if arguments.prompts is None else read_prompts(arguments.prompts)
    questions = [
        Question(prompt.id, prompt.task, prompt.messages, {"source": prompt.source, "licence": prompt.licence})
        for prompt in prompts
        if not any(benchmark.shares(text) for text in user_texts(prompt.messages))
    ]
    print(f"{len(questions)} of {len(prompts)} prompts; the others share text with --exclude")
    options = RecipeOptions(
        recipe=arguments.recipe,
        max_minutes=RecipeOptions.max_minutes if arguments.max_minutes is None else arguments.max_minutes,
        max_length=arguments.max_length,
        seed=training.seed,
        adapter=adapter_shape,
    )

    @contextmanager
    def packed(model):
        with grouped_queries(model), packed_linears(model, None):
            yield

    Recipe(training.output_dir, target, tokenizer, questions, ConFuAssistant, options, packed).run()
    print(summary(training.output_dir))


def stage_clock(arguments: ScriptArguments, training: TrainingArguments) -> StageClock | None:
    """The time of a stage that --max_minutes limits, which then ends it in place of a number of steps."""
    if arguments.max_minutes is None:
        return None
    if training.max_steps <= 0:
        training.max_steps = UNLIMITED_STEPS
    path = Path(training.output_dir) / "budget.json"
    identity = {"stage": arguments.stage, "seed": training.seed}
    budget = Budget(path, identity, {arguments.stage: 1.0}, 60 * arguments.max_minutes)
    return budget.start(arguments.stage)


def falling(training: TrainingArguments, clock: StageClock) -> Callable[[int], float]:
    """How far the learning rate is down its cosine at a step, by the clock; a constant one stays where it is."""
    if training.lr_scheduler_type in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        return lambda step: 0.0
    return lambda step: clock.progress()


def training_record(
    trainer: ConFuTrainer, arguments: ScriptArguments, objective: ConFuTrainingObjective, target: Any
) -> dict[str, Any]:
    """What a card says of this stage (make_card.py)."""
    training = trainer.args
    return {
        "stage": arguments.stage,
        "environment": environment(target),
        "steps": trainer.state.global_step,
        "sequences_per_step": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "answer_tokens": trainer.answer_tokens_seen,
        "learning_rate": training.learning_rate,
        "dtype": "bfloat16" if training.bf16 else "float32",
        "seed": training.seed,
        "objective": asdict(objective),
    }


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DraftShape, AdapterShape, ConFuTrainingObjective, TrainingArguments))
    arguments, draft_shape, adapter_shape, objective, training = parser.parse_args_into_dataclasses()
    if (arguments.data is None) == (arguments.recipe is None):
        parser.error("give --data for one stage, or --recipe for all of them")
    logging.get_logger("confu_hf").setLevel("INFO")
    set_seed(training.seed)
    dtype = product_dtype(training.device) if arguments.target_dtype == "auto" else arguments.target_dtype
    # A target to be sharded is loaded to the CPU: it does not fit the device as a whole.
    target, tokenizer = load_target(arguments.target, dtype, "cpu" if arguments.shard_target else training.device)
    if arguments.shard_target:
        shard_target(target)
    if arguments.recipe is not None:
        run_recipe(arguments, adapter_shape, training, target, tokenizer)
        return
    ends = target.generation_config.eos_token_id
    end_ids = list(ends) if isinstance(ends, list) else [ends]
    rows, held_out = load_rows(arguments, tokenizer)
    clock = stage_clock(arguments, training)
    draft = starting_pair(
        ConFuAssistant,
        target,
        rows,
        contemplate=arguments.stage == "confu",
        init_from=arguments.init_from,
        adapter_from=arguments.adapter_from,
        draft_shape=draft_shape,
        adapter_shape=adapter_shape,
        always=end_ids,
    )
    store = None
    if arguments.feature_store:
        name = arguments.target or "smollm2-135m-instruct"
        options = {"store_caches": arguments.store_caches, "limit": arguments.store_limit}
        store = open_store(arguments.feature_store, target, draft, rows, held_out, name=name, **options)
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
        router_learning_rate=arguments.router_learning_rate,
        replay=draft.replay(tree) if arguments.trees else None,
        progress=None if clock is None else falling(training, clock),
        callbacks=None if clock is None else [StageCallback(clock, steps=None)],
    )
    checkpoint = training.resume_from_checkpoint
    if checkpoint == "auto":
        checkpoint = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_json(Path(training.output_dir) / "training.json", training_record(trainer, arguments, objective, target))
    print(trainer.evaluate())


if __name__ == "__main__":
    sys.exit(main())
