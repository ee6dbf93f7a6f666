"""A pair to be trained: a fresh draft, a ConFu draft from an EAGLE-3 one, the adapter on the target, the store.

Loading and attaching are left to the caller: training knows no assistant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import inject_adapter_in_model
from transformers import PreTrainedModel

from ..adapter.config import ConFuAdapterConfig
from ..configuration_confu import ConFuConfig
from ..modeling_confu import ConFuDraftModel
from ..target.geometry import attention_geometry
from ..target.soft_prompts import soft_prompt_key_values
from .data import frequent_tokens
from .store import FeatureStore
from .warm_start import warm_start_from_eagle3, warm_start_from_target

SAMPLE = 8  # sequences that the size of features is read from


@dataclass
class DraftShape:
    """What a new draft looks like; the rest follows from its target. See [`ConFuConfig`]."""

    draft_vocab_size: int = 8192
    feedback_after_norm: bool = field(default=False, metadata={"help": "drafted rows hand on the normed state"})
    fc_norm: bool = field(default=False, metadata={"help": "one norm per feature before the fusion"})
    norm_before_residual: bool = field(default=False, metadata={"help": "the residual starts at the normed state"})
    qk_norm: bool = field(default=False, metadata={"help": "norms over heads of queries and keys"})
    own_embeddings: bool | None = field(default=None, metadata={"help": "token embeddings of the draft's own"})
    draft_hidden_size: int | None = field(default=None, metadata={"help": "width of the draft; default the target's"})
    target_layer_ids: list[int] | None = field(default=None, metadata={"help": "layers that are read"})

    def config(self, target: PreTrainedModel, *, contemplate: bool) -> ConFuConfig:
        """The draft's configuration for `target`."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        fields["draft_vocab_size"] = min(self.draft_vocab_size, target.config.get_text_config().vocab_size)
        if "draft_hidden_size" in fields:
            fields["hidden_size"] = fields.pop("draft_hidden_size")
        return ConFuConfig.from_target_config(target.config, contemplate=contemplate, **fields)


@dataclass
class AdapterShape:
    """What a new adapter looks like."""

    num_virtual_tokens: int = 16
    num_experts: int = 8
    num_experts_per_token: int = 2
    lora_rank: int = field(default=0, metadata={"help": "low-rank products for contemplate tokens alone; 0 = none"})
    lora_alpha: float | None = field(default=None, metadata={"help": "scaled by alpha / rank; default by 16"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "default all projections"})


@dataclass(frozen=True)
class FreshDraft:
    """A draft that is to be trained, and how it started."""

    draft: ConFuDraftModel
    coverage: float  # share of the answers' tokens that its vocabulary has
    from_target: list[str]  # names of the weights that came from the target


def fresh_draft(
    draft_class: type[ConFuDraftModel],
    shape: DraftShape,
    target: PreTrainedModel,
    rows: Dataset,
    *,
    contemplate: bool,
    always: Iterable[int] = (),
) -> FreshDraft:
    """A draft that starts from the target's own last layers, over the most frequent tokens of the answers.

    Args:
        rows: with `input_ids` and `labels`.
        always: token ids that the draft's vocabulary has in any case (end tokens).
    """
    config = shape.config(target, contemplate=contemplate)
    draft = draft_class(config)
    token_ids, coverage = frequent_tokens(rows, config.vocab_size, config.draft_vocab_size, always=always)
    draft.set_draft_vocabulary(token_ids)
    return FreshDraft(draft, coverage, warm_start_from_target(draft, target, sample=_first_tokens(rows)))


def _first_tokens(rows: Dataset) -> torch.Tensor:
    """`(B, N)` token ids of a few sequences, cut to the shortest of them."""
    sequences = [rows[index]["input_ids"] for index in range(min(SAMPLE, len(rows)))]
    length = min(len(sequence) for sequence in sequences)
    return torch.tensor([list(sequence)[:length] for sequence in sequences])


def confu_from_eagle3(draft_class: type[ConFuDraftModel], eagle3: ConFuDraftModel) -> ConFuDraftModel:
    """A ConFu draft that starts as the EAGLE-3 draft it is given."""
    draft = draft_class(ConFuConfig.from_dict({**eagle3.config.to_dict(), "contemplate": True}))
    warm_start_from_eagle3(draft, eagle3)
    return draft


def add_adapter(
    target: PreTrainedModel,
    draft: ConFuDraftModel,
    shape: AdapterShape | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Soft prompts and experts on the target, for a ConFu draft.

    Soft prompts start as the keys and values of random tokens of the draft's vocabulary, experts around the mean
    embedding; a gated LoRA starts as no change.

    Args:
        start: weights of another adapter, by short name, that this one goes on from; what it has not starts anew.
    """
    layers, kv_heads, head_dim = attention_geometry(target.config)
    config = ConFuAdapterConfig(
        **asdict(shape or AdapterShape()),
        target_hidden_size=draft.config.target_hidden_size,
        target_num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        target_layer_ids=list(draft.config.target_layer_ids),
    )
    inject_adapter_in_model(config, target)
    layer, table = target.confu, target.get_input_embeddings().weight
    with torch.no_grad():
        ids = draft.draft_token_ids[torch.randperm(draft.config.draft_vocab_size)[: config.num_virtual_tokens]]
        weight = layer.prompt_weight()
        embeds = table[ids.to(table.device)]
        weight.copy_(soft_prompt_key_values(target, embeds) if layer.soft_prompt_type == "kv" else embeds)
        mean = table[draft.draft_token_ids.to(table.device)].mean(0)
        layer.confu_experts[layer.current].weight.add_(mean)
    if start is not None:
        layer.set_adapter_weights(layer.current, {**layer.adapter_weights(layer.current), **start})


def open_store(
    folder: str, target: PreTrainedModel, draft: ConFuDraftModel, *parts: Dataset, name: str, store_caches: bool
) -> FeatureStore:
    """Target features on disk. They depend on the sequences, the target, its layers and the draft's vocabulary.

    Args:
        parts: rows with `index` and `input_ids`, numbered through.
        name: of the target.
        store_caches: keep the target's keys and values too, for ConFu's stage.
    """
    sequences = sorted((row["index"], row["input_ids"]) for part in parts for row in part)
    dtype = str(target.dtype).removeprefix("torch.")
    fingerprint = (
        f"{name} {dtype} {draft.config.target_layer_ids} {_digest(draft.draft_token_ids.cpu().numpy().tobytes())}"
    )
    return FeatureStore(
        folder,
        [len(input_ids) for _, input_ids in sequences],
        draft.config.target_hidden_size,
        f"{fingerprint} {_digest(repr(sequences).encode())}",
        attention_geometry(target.config) if store_caches else None,
        num_features=draft.config.num_features,
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
