"""`ConFuTrainer`: Hugging Face's `Trainer` around [`ConFuForTraining`].

Saves draft and adapter as the repository layout that users load. The loss of a step is a mean over all its rows,
wherever they ran: micro-batches and processes count their rows before they start, and all divide by the sum. Everything else (schedules, mixed precision, accelerate, checkpoints, resuming) is the `Trainer`'s own.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapter.attachment import LooseAdapter
from ..compat import multiplies_bfloat16
from ..errors import refusal
from ..hub.pair import read_pair, write_pair
from .data import answer_lengths, total_lengths
from .evaluation import HeldOut, Replay, acceptance_metrics, replayed, tree_metrics
from .health import check_gradients, router_metrics
from .losses import LossTerms
from .module import ConFuForTraining
from .optimizer import MuonAdamW

TOKENS_SEEN = "answer_tokens_seen"


class EpochOrder(Sampler):
    """Gives a sampler an order that follows from seed and epoch alone.

    The `Trainer`'s groups by length with the global random stream: resumed in a later epoch, a run would go through
    that epoch in the order of the first.

    Args:
        sampler: of every epoch. first: of the first one instead.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, first: LengthGroupedSampler | None = None):
        self.sampler, self.first, self.seed, self.epoch = sampler, first or sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        sampler = self.sampler if self.epoch else self.first
        sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(sampler)


class ConFuTrainer(Trainer):
    """`Trainer` for [`ConFuForTraining`]: logs the accepted length while it trains, writes draft and adapter apart,
    resumes exactly.

    Only the draft and the adapter are written: the target is frozen and is named in the card.

    Args:
        muon: optimise with [`MuonAdamW`], by the learning rate, betas and weight decay of the `TrainingArguments`;
            False leaves the choice to their `optim`.
        adapter_learning_rate: of soft prompts and experts, with `muon`; None = the same.
        lora_learning_rate: of the adapter's gated LoRA, with `muon`; None = the same.
        router_learning_rate: of the adapter's router, with `muon`; None = `adapter_learning_rate`.
        progress: step -> how much of the run is over, 0 to 1, where that is not known in steps (a run of limited time).
            After `warmup_steps` the learning rate falls with it as a cosine does; None = as the arguments say.
        replay: evaluation also counts accepted lengths in trees, `eval_tree_accepted_length` and one for each task of the
            held-out answers that were written greedily. As `metric_for_best_model` it keeps the best checkpoint.
    """

    def __init__(
        self,
        model: ConFuForTraining,
        *args: Any,
        muon: bool = False,
        adapter_learning_rate: float | None = None,
        lora_learning_rate: float | None = None,
        router_learning_rate: float | None = None,
        progress: Callable[[int], float] | None = None,
        replay: Replay | None = None,
        **kwargs: Any,
    ):
        self.muon, self.adapter_learning_rate = muon, adapter_learning_rate
        self.lora_learning_rate, self.router_learning_rate = lora_learning_rate, router_learning_rate
        self.progress, self.replay, self._held_out = progress, replay, HeldOut([])
        kwargs.setdefault("compute_metrics", self._metrics)
        super().__init__(model, *args, **kwargs)
        self._window = np.zeros(3)  # summed accepted lengths, their rows, answer tokens drafted for
        self._routers: dict[str, torch.Tensor] = {}  # summed use of the experts
        self._sequences: list[int] = []  # of the step that is being computed
        if self.args.n_gpu > 1:
            raise refusal(
                "ConFuTrainer",
                got=f"{self.args.n_gpu} GPUs in one process",
                expected="one process per GPU",
                fix="Start the script with `accelerate launch`, or choose one by CUDA_VISIBLE_DEVICES.",
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise refusal(
                "ConFuTrainer",
                got="FSDP" if self.is_fsdp_enabled else "DeepSpeed",
                expected="one process, or DDP: draft and adapter are small and stay whole",
                fix="Launch with examples/accelerate/eight_gpus.yaml; if the target does not fit one device, with "
                "sharded_target.yaml and --shard_target true.",
            )
        if self.args.bf16 and self.args.device.type == "cpu" and not multiplies_bfloat16():
            warnings.warn(
                "bf16: got a CPU without instructions for products of bfloat16, expected AVX512-BF16 or AMX. "
                "Training will take several times as long as in float32: leave --bf16 out.",
                stacklevel=2,
            )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        # By what a step costs. The target reads prompts too, and padding is as dear to it as text: one total length.
        # Once a store is filled it does not run, and the rows of the answers are all that counts.
        # All that one step of the optimizer sees, in all processes, is of one length.
        rows, args = train_dataset or self.train_dataset, self.args
        stored = self.accelerator.unwrap_model(self.model).teacher.store is not None
        group = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        by_total = LengthGroupedSampler(group, lengths=total_lengths(rows))
        sampler = LengthGroupedSampler(group, lengths=answer_lengths(rows)) if stored else by_total
        return EpochOrder(sampler, args.seed if args.data_seed is None else args.data_seed, first=by_total)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not self.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
        self.optimizer = MuonAdamW(
            named,
            lr=self.args.learning_rate,
            adapter_lr=self.adapter_learning_rate,
            lora_lr=self.lora_learning_rate,
            router_lr=self.router_learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.progress is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = max(int(self.args.warmup_steps), 1)

        def factor(step: int) -> float:
            return min((step + 1) / warmup, 1.0) * (1 + math.cos(math.pi * self.progress(step))) / 2

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """The micro-batches of one step, and what all processes together divide their losses by, `(K + 1,)`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        module = self.accelerator.unwrap_model(self.model)
        counts = sum(module.denominators(batch["labels"]).to(device) for batch in batches)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        """As the `Trainer`'s; gradients that are no numbers stop the run before the optimizer takes them."""
        self._sequences += inputs["index"].tolist() if "index" in inputs else []
        loss = super().training_step(model, inputs, *args)
        if self.accelerator.sync_gradients:
            if self.accelerator.scaler is None:  # float16's scaler leaves such steps out by itself
                check_gradients(
                    model.parameters(),
                    step=self.state.global_step + 1,
                    sequences=self._sequences,
                    folder=self.args.output_dir,
                )
            self._sequences = []
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`num_items_in_batch`: from [`get_batch_samples`]; in evaluation a batch is its own whole."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training:
            accepted = outputs["accepted"].detach().sum(0).tolist()
            self._window += (*accepted, outputs["correct"][:, 0, 1].sum().item())
            for name, use in outputs.get("routers", {}).items():
                self._routers[name] = self._routers.get(name, 0) + use
            if num_items_in_batch is not None:
                loss = LossTerms(outputs["numerators"], outputs["denominators"]).mean(num_items_in_batch)
                # Gradients, and what is logged, are averaged over processes, which have divided by the sum already.
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        if self.replay is not None and not isinstance(rows, dict):
            self._held_out = HeldOut(rows)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        ignored = [*(ignore_keys or []), "numerators", "denominators"]
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        if self.replay is not None and outputs is not None:
            module = self.accelerator.unwrap_model(self.model)
            outputs = (*outputs, *replayed(module, self.replay, self._held_out, self._prepare_inputs(inputs)))
        return loss, outputs, labels

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = acceptance_metrics(prediction)
        if self.replay is not None:
            totals, numbers = prediction.predictions[2:]
            metrics |= tree_metrics(totals, numbers[:, 0], self._held_out.names)
        return metrics

    def _tokens_logged(self) -> int:
        # The history comes back with a checkpoint, so the count goes on after resuming.
        return next((entry[TOKENS_SEEN] for entry in self.state.log_history[::-1] if TOKENS_SEEN in entry), 0)

    @property
    def answer_tokens_seen(self) -> int:
        """Answer tokens that the draft was trained on; of other processes, those that were logged."""
        return self._tokens_logged() + int(self._window[2])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            # Every process logs; each has seen its own part of the batches.
            window = torch.tensor(self._window, dtype=torch.float32, device=self.accelerator.device)
            accepted, rows, tokens = self.accelerator.reduce(window, reduction="sum").tolist()
            self._window[:] = 0
            if rows:
                logs["train_accepted_length"] = round(accepted / rows, 3)
                logs[TOKENS_SEEN] = self._tokens_logged() + int(tokens)
            for name, use in sorted(self._routers.items()):
                logs |= router_metrics(name, self.accelerator.reduce(use, reduction="sum"))
            self._routers = {}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        module = self.accelerator.unwrap_model(self.model)
        layer = module.target.confu if module.draft.config.contemplate else None
        write_pair(output_dir, module.draft, None if layer is None else LooseAdapter.of_layer(layer, layer.current))
        if os.path.basename(os.path.normpath(output_dir)).startswith(PREFIX_CHECKPOINT_DIR):
            # Only there, as every Trainer does: the folder to publish holds no pickle.
            torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        module = self.accelerator.unwrap_model(model or self.model)
        pair = read_pair(resume_from_checkpoint, config=module.draft.config)
        if pair.adapter is not None:  # first: it may be another run's, and is refused whole
            module.target.confu.set_adapter_weights(module.target.confu.current, pair.adapter.weights)
        module.draft.load_state_dict(pair.weights)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
