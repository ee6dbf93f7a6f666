"""A pair to be trained: a fresh draft, a ConFu draft from an EAGLE-3 one, the adapter on the target, the store.

Training knows no assistant: its class, which loads and attaches, is handed in.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import inject_adapter_in_model
from transformers import PreTrainedModel
from transformers.utils import logging

from ..adapter.config import ConFuAdapterConfig
from ..configuration_confu import ConFuConfig, TargetGeometry
from ..errors import refusal
from ..hub.fingerprint import remember_target
from ..hub.pair import read_pair
from ..modeling_confu import ConFuDraftModel
from ..target.geometry import attention_geometry
from ..target.soft_prompts import soft_prompt_key_values
from .data import frequent_tokens
from .store import FeatureStore, store_bytes
from .warm_start import open_words, warm_start_from_eagle3, warm_start_from_target

logger = logging.get_logger(__name__)

SAMPLE = 8  # sequences that the size of features is read from
STORE_SHARE = 0.9  # of the free disk


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
    future_words: int | None = field(
        default=None,
        metadata={
            "help": "ConFu: so many contemplate tokens in a row, whose own words join the first drafted rows' logits"
        },
    )

    def config(self, target: PreTrainedModel, *, contemplate: bool) -> ConFuConfig:
        """The draft's configuration for `target`."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        fields["future_words"] = (self.future_words or 0) if contemplate else 0
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
    soft_prompt_type: str | None = field(
        default=None, metadata={"choices": ["kv", "embedding"], "help": "default kv, if the target can have them"}
    )
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
    remember_target(config, target)
    draft = draft_class(config)
    token_ids, coverage = frequent_tokens(rows, config.vocab_size, config.draft_vocab_size, always=always)
    draft.set_draft_vocabulary(token_ids)
    return FreshDraft(draft, coverage, warm_start_from_target(draft, target, sample=_first_tokens(rows)))


def starting_pair(
    assistant_class: type[ConFuDraftModel],
    target: PreTrainedModel,
    rows: Dataset,
    *,
    contemplate: bool,
    init_from: str | None = None,
    adapter_from: str | None = None,
    draft_shape: DraftShape | None = None,
    adapter_shape: AdapterShape | None = None,
    always: Iterable[int] = (),
) -> ConFuDraftModel:
    """What a stage starts with, attached to `target`: fresh from it, from EAGLE-3, or from a pair of the stage's own kind.

    Args:
        assistant_class: `ConFuAssistant`: knows files, and how to attach.
        contemplate: ConFu's stage or EAGLE-3's.
        init_from: EAGLE-3 draft or ConFu pair; None = from the target's own last layers.
        draft_shape: of a new draft. Of one that goes on, only how many words it is to have.
        adapter_from: a ConFu pair whose adapter this one starts with, as it is; its draft is not looked at.
        adapter_shape: of a new adapter. A pair that goes on keeps its own, but gets a gated LoRA if it has none and
            this asks for one.
        always: see [`fresh_draft`].
    """
    shape, start = adapter_shape or AdapterShape(), None
    draft_shape = draft_shape or DraftShape()
    if init_from is None:
        fresh = fresh_draft(assistant_class, draft_shape, target, rows, contemplate=contemplate, always=always)
        logger.info(f"the draft's vocabulary covers {fresh.coverage:.1%} of the answers' tokens")
        logger.info(f"started from the target: {', '.join(fresh.from_target)}")
        draft = fresh.draft
    else:
        draft = assistant_class.from_pretrained(init_from, dtype=torch.float32)
        if contemplate and not draft.config.contemplate:
            draft = confu_from_eagle3(assistant_class, draft, future_words=draft_shape.future_words or 0)
            if draft.config.future_words:
                open_words(draft, target)
            if adapter_from is not None:
                adapter = read_pair(adapter_from).adapter
                shape, start = _shape_of(adapter.config), adapter.weights
        elif contemplate:
            adapter, grows = read_pair(init_from).adapter, _more_words(draft, draft_shape)
            has_low_rank = bool(adapter.config.lora_rank or not shape.lora_rank)
            if has_low_rank and not grows:
                return _trainable(draft.attach(target))
            shape = _shape_of(adapter.config) if has_low_rank else _with_low_rank(adapter.config, shape)
            start, draft = adapter.weights, _grown(assistant_class, draft, target, draft_shape)
    if contemplate:
        add_adapter(target, draft, shape, start)
    return _trainable(draft.attach(target))


def _more_words(draft: ConFuDraftModel, shape: DraftShape) -> bool:
    """Whether `shape` asks for more words than the draft has; it is refused if it asks for fewer."""
    has = draft.config.future_words
    if shape.future_words is None:
        return False
    if shape.future_words < has:
        raise refusal(
            "future_words",
            got=f"{shape.future_words} for a pair that has {has}",
            expected=f"{has} or more",
            fix="Leave it out to go on with those of the pair, or start from its EAGLE-3 draft.",
        )
    return shape.future_words > has


def _grown(
    draft_class: type[ConFuDraftModel], draft: ConFuDraftModel, target: PreTrainedModel, shape: DraftShape
) -> ConFuDraftModel:
    """The same draft without the adapter that it was loaded with, and with the words that `shape` asks for."""
    known, config = draft.config.future_words, draft.config.to_dict()
    grown = draft_class(ConFuConfig.from_dict({**config, "future_words": max(known, shape.future_words or 0)}))
    weights = draft.state_dict()
    words = weights.pop("future_word.weight", None)
    grown.load_state_dict(weights, strict=False)
    if words is not None:
        grown.future_word.weight.data[: len(words)] = words
    if grown.config.future_words > known:
        open_words(grown, target, known)
    return grown


def _trainable(draft: ConFuDraftModel) -> ConFuDraftModel:
    """The adapter in float32, whatever the target's dtype: small steps would be rounded away."""
    if draft.config.contemplate:
        draft.target.confu.float()
    return draft.float().to(draft.target.device)


def _shape_of(config: ConFuAdapterConfig) -> AdapterShape:
    return AdapterShape(**{entry.name: getattr(config, entry.name) for entry in fields(AdapterShape)})


def _with_low_rank(config: ConFuAdapterConfig, shape: AdapterShape) -> AdapterShape:
    """An adapter's own shape, with the gated LoRA of another."""
    names = ("num_virtual_tokens", "num_experts", "num_experts_per_token", "soft_prompt_type")
    return replace(shape, **{name: getattr(config, name) for name in names})


def _first_tokens(rows: Dataset) -> torch.Tensor:
    """`(B, N)` token ids of a few sequences, cut to the shortest of them."""
    if len(rows) == 0:
        raise refusal(
            "rows",
            got="none",
            expected="sequences to start a draft with",
            fix="Make answers with examples/regenerate.py.",
        )
    sequences = [rows[index]["input_ids"] for index in range(min(SAMPLE, len(rows)))]
    length = min(len(sequence) for sequence in sequences)
    return torch.tensor([list(sequence)[:length] for sequence in sequences])


def confu_from_eagle3(
    draft_class: type[ConFuDraftModel], eagle3: ConFuDraftModel, *, future_words: int = 0
) -> ConFuDraftModel:
    """A ConFu draft that starts as the EAGLE-3 draft it is given."""
    more = {"contemplate": True, "future_words": future_words}
    draft = draft_class(ConFuConfig.from_dict({**eagle3.config.to_dict(), **more}))
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
    folder: str,
    target: PreTrainedModel,
    draft: ConFuDraftModel,
    *parts: Dataset,
    name: str,
    store_caches: bool,
    limit: float | None = None,
) -> FeatureStore:
    """Target features on disk. They depend on the sequences, the target, its layers and the draft's vocabulary.

    Args:
        parts: rows with `index` and `input_ids`, numbered through.
        name: of the target.
        store_caches: keep the target's keys and values too, for ConFu's stage.
        limit: the most gigabytes it may become; None = 90 % of what the disk has free.

    Raises:
        ValueError: it would become larger.
    """
    sequences = sorted((row["index"], row["input_ids"]) for part in parts for row in part)
    if store_caches and TargetGeometry.of(target.config).caches_latents:
        raise refusal(
            "store_caches",
            got="a target that caches latents, keys and values of different width",
            expected="one with multi-head or grouped-query attention",
            fix="Leave it out: the target then runs for its keys and values.",
        )
    shape = attention_geometry(target.config) if store_caches else None
    positions = sum(len(input_ids) for _, input_ids in sequences)
    size = store_bytes(positions, draft.config.target_hidden_size, draft.config.num_features, shape) / 1e9
    logger.info(f"{folder}: the target's features of {positions} positions take up to {size:.2f} GB")
    if size > (free_gigabytes(folder) if limit is None else limit):
        raise refusal(
            "feature_store",
            got=f"{size:.2f} GB for {positions} positions",
            expected=f"at most {free_gigabytes(folder) if limit is None else limit:.2f} GB",
            fix="Train without it, without the target's keys and values (--store_caches), on fewer sequences, or raise "
            "--store_limit.",
        )
    dtype = str(target.dtype).removeprefix("torch.")
    fingerprint = (
        f"{name} {dtype} {draft.config.target_layer_ids} {_digest(draft.draft_token_ids.cpu().numpy().tobytes())}"
    )
    return FeatureStore(
        folder,
        [len(input_ids) for _, input_ids in sequences],
        draft.config.target_hidden_size,
        f"{fingerprint} {_digest(repr(sequences).encode())}",
        shape,
        num_features=draft.config.num_features,
    )


def free_gigabytes(folder: str) -> float:
    """What a store may take of the disk that `folder` is, or will be, on; what it has already counts as free."""
    path = Path(folder).absolute()
    taken = sum(file.stat().st_size for file in path.glob("*.bin")) if path.is_dir() else 0
    while not path.is_dir():
        path = path.parent
    return (STORE_SHARE * shutil.disk_usage(path).free + taken) / 1e9


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
