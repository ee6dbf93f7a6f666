"""A pair for a target within a given time: answers, EAGLE-3, adapter, ConFu, EAGLE-3's twin, evaluation, as stages.

Every stage can be interrupted and goes on where it was; what is done is in `recipe.json` of the folder (budget.py). What a
stage computes at once follows from the device (sizes.py). The assistant's class, which decoding belongs to, is handed in.

    regenerate   the target answers prompts, in random order, until its time is over        answers.jsonl
    eagle3       a draft from the target's own last layers learns from them                  eagle3/
    adapter      contemplate tokens learn what the target says one position on, no draft     adapter/
    confu        that draft goes on, with this adapter, and both learn                       confu/
    twin         that draft goes on without one, for as many steps: the fair baseline        twin/
    evaluate     both in trees over held-out greedy answers, by task; ConFu with `f` masked  results of recipe.json

The recipe `eagle3` is the first two and the last.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..adapter.tuner import remove_adapter
from ..modeling_confu import ConFuDraftModel
from ..options import TreeOptions
from .answers import Question, write_answers
from .budget import Budget, StageClock
from .data import ConversationCollator, load_conversations, split_held_out
from .evaluation import HeldOut, replayed, tree_metrics
from .module import ConFuForTraining, ConFuTrainingObjective
from .optimizer import product_dtype
from .pair import AdapterShape, DraftShape, free_gigabytes, open_store, starting_pair
from .sizes import plan_sizes
from .store import FeatureStore
from .teacher import logit_transforms
from .trainer import ConFuTrainer

logger = logging.get_logger(__name__)

SHARES = {
    "eagle3": {"regenerate": 0.3, "eagle3": 0.6, "evaluate": 0.1},
    "confu": {"regenerate": 0.25, "eagle3": 0.25, "adapter": 0.1, "confu": 0.2, "twin": 0.1, "evaluate": 0.1},
}
CHECKPOINTS_PER_STAGE = 5
UNLIMITED_STEPS = 10**6  # where the clock ends a stage
ANCHORS_ALONE = 4  # times as many contemplate tokens where no draft runs
EVALUATED_TOGETHER = 8  # sequences: rounds of several cost little more than rounds of one


@dataclass(frozen=True)
class RecipeOptions:
    """What a recipe needs to know beyond its time; the defaults are what worked best so far (EXPERIMENTS.md)."""

    recipe: str = "confu"
    max_minutes: float = 15.0
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7)
    max_new_tokens: int = 192
    max_length: int = 768
    held_out: int = 32
    learning_rate: float = 1e-3
    adapter_learning_rate: float = 3e-3
    lora_learning_rate: float = 3e-4
    router_learning_rate: float = 1e-4
    warmup_steps: int = 10
    logging_steps: int = 10
    store_limit: float = 20.0  # gigabytes on disk for what the target says
    seed: int = 0
    draft: DraftShape = field(
        default_factory=lambda: DraftShape(feedback_after_norm=True, fc_norm=True, future_words=1)
    )
    adapter: AdapterShape = field(default_factory=lambda: AdapterShape(lora_rank=16))
    objective: ConFuTrainingObjective = field(
        default_factory=lambda: ConFuTrainingObjective(
            deep_rows="survivors", num_anchors=16, max_lag=4, future_weight=0.3
        )
    )
    tree: TreeOptions = field(default_factory=lambda: TreeOptions(total_tokens=30, depth=7, top_k=10))


class StageCallback(TrainerCallback):
    """Ends a stage in time, and saves a checkpoint now and then."""

    def __init__(self, clock: StageClock, steps: int | None):
        self.clock, self.steps, self.saved = clock, steps, clock.seconds

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.tick()
        control.should_training_stop = self.clock.over() if self.steps is None else state.global_step >= self.steps
        if self.clock.seconds - self.saved > self.clock.limit / CHECKPOINTS_PER_STAGE:
            self.saved = self.clock.seconds
            control.should_save = True


class Recipe:
    """Runs the stages that are not done yet.

    Args:
        folder: where everything is kept.
        target, tokenizer: the model, in the dtype and on the device that it is to train on.
        questions: prompts, more than the time suffices for if possible.
        assistant_class: `ConFuAssistant`.
        accelerated: makes the target cheaper while it writes; nothing, unless given.
    """

    def __init__(
        self,
        folder: str | Path,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        assistant_class: type[ConFuDraftModel],
        options: RecipeOptions,
        accelerated: Callable[[PreTrainedModel], AbstractContextManager] = lambda model: nullcontext(),
    ):
        self.folder, self.target, self.tokenizer, self.questions = Path(folder), target, tokenizer, questions
        self.assistant_class, self.options, self.accelerated = assistant_class, options, accelerated
        identity = {"recipe": options.recipe, "target": target.config.name_or_path, "seed": options.seed}
        shares = SHARES[options.recipe]
        self.budget = Budget(self.folder / "recipe.json", identity, shares, 60 * options.max_minutes)
        self.sizes = plan_sizes(
            target,
            draft_vocab_size=options.draft.draft_vocab_size,
            steps=options.objective.ttt_steps,
            max_length=options.max_length,
        )

    def run(self) -> dict[str, Any]:
        """All stages; returns what the last one found."""
        for stage in SHARES[self.options.recipe]:
            if not self.budget.done(stage):
                getattr(self, f"_{stage}")(self.budget.start(stage))
        return self.budget.results("evaluate")

    def _regenerate(self, clock: StageClock) -> None:
        options, order = self.options, list(self.questions)
        random.Random(options.seed).shuffle(order)
        with self.accelerated(self.target):
            written = write_answers(
                self.folder / "answers.jsonl",
                self.target,
                self.tokenizer,
                order,
                temperatures=options.temperatures,
                max_new_tokens=options.max_new_tokens,
                max_prompt_tokens=options.max_length - options.max_new_tokens,
                batch_size=self.sizes.answers,
                seed=options.seed,
                stop=lambda: clock.tick() or clock.over(),
            )
        self._rows()  # refuses what the next stage could not learn from, while this one can still go on
        clock.finish(**written)

    def _eagle3(self, clock: StageClock) -> None:
        self._train(clock, contemplate=False, decays=self.options.recipe == "eagle3")

    def _adapter(self, clock: StageClock) -> None:
        objective = self.options.objective
        alone = replace(objective, adapter_alone=True, num_anchors=ANCHORS_ALONE * objective.num_anchors)
        self._train(clock, contemplate=True, init_from=self.folder / "eagle3", objective=alone)

    def _confu(self, clock: StageClock) -> None:
        self._train(clock, contemplate=True, init_from=self.folder / "eagle3", adapter_from=self.folder / "adapter")

    def _twin(self, clock: StageClock) -> None:
        steps = self.budget.results("confu")["steps"]
        self._train(clock, contemplate=False, init_from=self.folder / "eagle3", steps=steps)

    def _rows(self) -> tuple[Dataset, Dataset]:
        rows = load_conversations(
            [str(self.folder / "answers.jsonl")],
            self.tokenizer,
            max_length=self.options.max_length,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return split_held_out(rows, self.options.held_out)

    def _collator(self) -> ConversationCollator:
        return ConversationCollator(self.tokenizer.pad_token_id or 0)

    def _train(
        self,
        clock: StageClock,
        *,
        contemplate: bool,
        init_from: Path | None = None,
        adapter_from: Path | None = None,
        objective: ConFuTrainingObjective | None = None,
        steps: int | None = None,
        decays: bool = True,
    ) -> None:
        """Train until the time of the stage is over, or for `steps`. The learning rate goes down, if it does, with it."""
        options, (rows, held_out) = self.options, self._rows()
        torch.manual_seed(options.seed)
        draft = starting_pair(
            self.assistant_class,
            self.target,
            rows,
            contemplate=contemplate,
            init_from=None if init_from is None else str(init_from),
            adapter_from=None if adapter_from is None else str(adapter_from),
            draft_shape=options.draft,
            adapter_shape=options.adapter,
            always=[self.tokenizer.eos_token_id],
        )
        folder = self.folder / clock.name
        trainer = ConFuTrainer(
            ConFuForTraining(self.target, draft, objective or options.objective, self._store(draft, rows, held_out)),
            self._arguments(folder),
            train_dataset=rows,
            data_collator=self._collator(),
            muon=True,
            adapter_learning_rate=options.adapter_learning_rate,
            lora_learning_rate=options.lora_learning_rate,
            router_learning_rate=options.router_learning_rate,
            progress=_progress(clock, steps) if decays else lambda step: 0.0,
            callbacks=[StageCallback(clock, steps)],
        )
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        clock.finish(steps=trainer.state.global_step, answer_tokens_seen=trainer.answer_tokens_seen)
        self._take_off(draft)

    def _store(self, draft: ConFuDraftModel, *parts: Dataset) -> FeatureStore | None:
        """What the target says, kept from epoch to epoch and from stage to stage, where it may be and the disk has room."""
        if self.target.device.type != "cpu" or logit_transforms(self.target):
            return None  # a GPU computes it faster than most disks read it
        folder, name = self.folder / "features", self.target.config.name_or_path
        try:
            return open_store(
                str(folder),
                self.target,
                draft,
                *parts,
                name=name,
                store_caches=draft.config.contemplate,
                limit=min(self.options.store_limit, free_gigabytes(str(folder))),
            )
        except ValueError as error:
            logger.info(f"without a store: {error}")
            return None

    def _arguments(self, folder: Path) -> TrainingArguments:
        on_cpu = self.target.device.type == "cpu"
        return TrainingArguments(
            str(folder),
            max_steps=UNLIMITED_STEPS,
            per_device_train_batch_size=self.sizes.sequences,
            dataloader_num_workers=self.sizes.workers,
            learning_rate=self.options.learning_rate,
            warmup_steps=self.options.warmup_steps,
            weight_decay=0.0,
            adam_beta2=0.95,
            bf16=product_dtype(self.target.device) == torch.bfloat16,
            use_cpu=on_cpu,
            seed=self.options.seed,
            save_strategy="no",  # but by the clock
            save_total_limit=1,
            logging_steps=self.options.logging_steps,
            train_sampling_strategy="group_by_length",
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        )

    def _take_off(self, draft: ConFuDraftModel) -> None:
        """The target without draft and adapter, for the next stage."""
        draft.detach()
        layer = getattr(self.target, "confu", None)
        for name in list(layer.configs) if layer is not None else []:
            remove_adapter(self.target, name)

    def _evaluate(self, clock: StageClock) -> None:
        """Both drafts on the same batches, until the time is over; at least one batch."""
        tree, held_out = self.options.tree, self._rows()[1]
        baseline = "eagle3" if self.options.recipe == "eagle3" else "twin"
        names = {"eagle3": baseline} | ({} if baseline == "eagle3" else {"confu": "confu"})
        drafts = {
            name: self.assistant_class.from_pretrained(self.folder / folder, target=self.target, dtype=torch.float32)
            for name, folder in names.items()
        }
        replays = {name: (draft, draft.replay(tree)) for name, draft in drafts.items()}
        if "confu" in drafts:
            replays["confu, f masked"] = drafts["confu"], drafts["confu"].replay(replace(tree, contemplate=False))
        tasks, collate, count = HeldOut(held_out), self._collator(), 0
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in replays}
        while count < len(held_out) and not (count and clock.over()):
            batch = collate([held_out[i] for i in range(count, min(count + EVALUATED_TOGETHER, len(held_out)))])
            batch = {name: states.to(self.target.device) for name, states in batch.items()}
            for name, (draft, replay) in replays.items():
                found[name].append(replayed(ConFuForTraining(self.target, draft), replay, tasks, batch))
            count += len(batch["index"])
            clock.tick()
        results = {}
        for name, parts in found.items():
            totals, numbers = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
            results[name] = tree_metrics(totals, numbers[:, 0], tasks.names)
        for draft in drafts.values():
            draft.detach()
        clock.finish(sequences=count, tree=asdict(tree), accepted=results)


def _progress(clock: StageClock, steps: int | None) -> Callable[[int], float]:
    """How much of a stage is over at a step, from 0 to 1."""
    return lambda step: clock.progress() if steps is None else min(step / steps, 1.0)


def summary(folder: str | Path) -> str:
    """What a run did, stage by stage, for people."""
    stages = json.loads((Path(folder) / "recipe.json").read_text())["stages"]
    lines = []
    for name, noted in stages.items():
        figures = [
            f"{key} {value}" for key, value in noted.items() if isinstance(value, int | float) and key != "done"
        ]
        lines.append(f"{name}: {', '.join(figures)}")
    for name, metrics in stages.get("evaluate", {}).get("accepted", {}).items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
    return "\n".join(lines)
