"""The decoding loop of ConFu. A round: draft a tree, verify it in one target forward, accept a path, keep its rows,
draft on.

Positions: `v` is the newest position whose features are known, so the root of the tree is `x_{v+1}`, decided but not
    yet seen by the target.

Here the parts meet: `modeling_confu.py` drafts, `tree.py` picks nodes, `target.py` runs the target, `verification.py`
    accepts, `cache.py` keeps rows.
How `generate()` gets here, and what it refuses before, is `assisted.py`'s.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .cache import TreeCache
from .compat import decoder_only_output
from .drafting import DraftRound
from .modeling_confu import ConFuDraftModel
from .packing import PackedLinears, multiplies_bfloat16
from .stats import GenerationStats, Tally
from .target import prefill, soft_prompt_key_values, verify
from .tree import DraftTree, grow_tree, likeliest_ends, nearest_contemplated, verify_layout
from .verification import Acceptance, accept

PACK_LIMIT_BYTES = 2 * 2**30


@dataclass(frozen=True)
class TreeOptions:
    """What a round may spend. Lives on the assistant's `generation_config`; each can be an argument of `generate`.

    Args:
        total_tokens: drafted tokens verified per round (`T`); the root comes on top. 0 = plain decoding.
        depth: the most tokens drafted in a row; the draft runs this many times a round.
        top_k: nodes expanded per draft step, and children considered for each.
        confidence_threshold: drafted tokens to which the draft gives a smaller joint probability (from the root down)
            are not verified, and drafting stops when none is left. 0 = always the whole tree.
        contemplate_tokens: contemplate tokens per round (`M`), on the nodes most likely to be the last accepted; None
            = one for every node.
        contemplate: False switches contemplation off (EAGLE-3 mode).
        pack_weights: on CPU, decode with a copy of the linear layers packed for small batches of rows, the draft's in
            bfloat16 if the CPU multiplies that; None = if that copy stays below 2 GiB.
    """

    total_tokens: int = 30
    depth: int = 5
    top_k: int = 8
    confidence_threshold: float = 0.0
    contemplate_tokens: int | None = None
    contemplate: bool = True
    pack_weights: bool | None = None


@dataclass(frozen=True)
class DecodingState:
    """Where a generation stands between two rounds. `R` rows wait for the draft: those of the last accepted path, the
    start row last.

    Attributes:
        input_ids: `(B, n)` long, everything decided; the last token is the root.
        committed_position_ids: `(B, C)` long, position of each committed slot of the target's cache, -1 = padding.
        row_tokens: `(B, R)` long, `x_{i+1}` of the waiting rows; the last is the root.
        row_features: `(B, R, 3 d)`, `F_i` of the waiting rows.
        row_position_ids: `(B, R)` long.
        future: `(B, 3 d)`, `f_v`; None in the first round and in EAGLE-3 mode.
    """

    input_ids: Tensor
    committed_position_ids: Tensor
    row_tokens: Tensor
    row_features: Tensor
    row_position_ids: Tensor
    future: Tensor | None = None

    def advance(self, acceptance: Acceptance, features: Tensor, future: Tensor | None) -> DecodingState:
        """The state after a round whose accepted nodes have `features` `(B, P, 3 d)`.

        Example: root x_5, accepted path x_5 x_6, bonus x_7. Slots 5 and 6 are committed; rows 5 (reads x_6) and 6
            (reads x_7) wait; x_7 is the next root.
        """
        path_length = acceptance.path.shape[1]
        steps = torch.arange(1, path_length + 1, device=self.row_position_ids.device)
        positions = self.row_position_ids[:, -1:] + steps  # (B, P)
        return DecodingState(
            input_ids=torch.cat([self.input_ids, acceptance.tokens], dim=1),
            committed_position_ids=torch.cat([self.committed_position_ids, positions], dim=1),
            row_tokens=acceptance.tokens,
            row_features=features,
            row_position_ids=positions,
            future=future,
        )


class Decoder:
    """One call of `generate`: target, draft, their caches, and the rules for choosing tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft: ConFuDraftModel,
        options: TreeOptions,
        processors: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ):
        self.model, self.draft, self.options = model, draft, options
        self.contemplate = options.contemplate and draft.config.contemplate
        self.layer_ids = draft.config.target_layer_ids
        self.processors, self.stopping_criteria = processors, stopping_criteria
        self.do_sample = bool(generation_config.do_sample)
        self.max_length = getattr(stopping_criteria, "max_length", None)
        self.record = bool(
            generation_config.return_dict_in_generate
            and (generation_config.output_scores or generation_config.output_logits)
        )
        self.criteria_see_scores = bool(generation_config.output_scores)
        self.scores: tuple[Tensor, ...] = ()
        self.raw_logits: tuple[Tensor, ...] = ()
        self.tally = Tally()

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, user_cache: Cache | None):
        """Prefill, and the first token: a round whose tree is only its root, the prompt's last token."""
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        soft_prompts = self._soft_prompts() if self.contemplate else None
        if user_cache is not None and user_cache.get_seq_length() > 0:
            self.cache = TreeCache.from_cache(user_cache, layers, soft_prompts)
        else:
            self.cache = TreeCache(layers, soft_prompts)
        self.draft_cache = TreeCache(1)
        past = self.cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask.bool()
        positions = (real.long().cumsum(-1) - 1).masked_fill(~real, -1)  # (B, n)
        prefilled = prefill(
            self.model,
            input_ids[:, past:],
            self.cache,
            self.layer_ids,
            # Without padding the model's fastest causal path needs no mask.
            attention_mask=None if bool(real.all()) else attention_mask,
        )
        acceptance = self._accept(root_only(input_ids[:, -1]), prefilled.logits[:, None], input_ids)
        rows = real[0, past:]  # padding has no row
        tokens = torch.cat([input_ids[:, past + 1 :], acceptance.tokens], dim=1)
        state = DecodingState(
            input_ids=torch.cat([input_ids, acceptance.tokens], dim=1),
            committed_position_ids=positions,
            row_tokens=tokens[:, rows],
            row_features=prefilled.features[:, rows],
            row_position_ids=positions[:, past:][:, rows],
        )
        return state, acceptance

    def round(self, state: DecodingState) -> tuple[DecodingState, Acceptance]:
        """Draft, verify, accept, keep."""
        with self.tally.phase("draft"):
            tree = self._grow(state)
            nodes = self._contemplate_nodes(tree)
        with self.tally.phase("verify"):
            layout = verify_layout(
                tree,
                nodes,
                committed_position_ids=state.committed_position_ids,
                soft_prompt_length=self.cache.soft_prompt_length,
            )
            embedding = self._contemplate_embedding(state.row_features[:, -1]) if nodes.shape[1] else None
            verified = verify(self.model, layout, embedding, self.cache, self.layer_ids)
        acceptance = self._accept(tree, verified.logits, state.input_ids)
        self.cache.keep_path(acceptance.path)
        index = acceptance.path[..., None].expand(-1, -1, verified.features.shape[-1])
        future = None
        if nodes.shape[1]:
            nearest = nearest_contemplated(tree, nodes).gather(1, acceptance.path[:, -1:])[:, 0]  # (B,)
            if int(nearest[0]) >= 0:
                future = verified.futures[torch.arange(len(nearest), device=nearest.device), nearest]
        self.tally.add_round(acceptance.path.shape[1], tree.tokens.shape[1], nodes.shape[1])
        return state.advance(acceptance, verified.features.gather(1, index), future), acceptance

    def _grow(self, state: DecodingState) -> DraftTree:
        depth = self.options.depth
        if self.max_length is not None:
            # Of n decided tokens and a limit of n + 2, the bonus token takes one place: draft one.
            depth = min(depth, self.max_length - state.input_ids.shape[1] - 1)
        total_tokens = self.options.total_tokens if depth > 0 else 0
        if total_tokens == 0:
            return root_only(state.input_ids[:, -1])
        drafting = DraftRound(
            self.draft,
            self.model.get_input_embeddings(),
            self.draft_cache,
            tokens=state.row_tokens,
            features=state.row_features,
            position_ids=state.row_position_ids,
            future=state.future,
            top_k=self.options.top_k,
        )
        tree = grow_tree(
            drafting.step,
            state.input_ids[:, -1],
            total_tokens=total_tokens,
            depth=depth,
            confidence_threshold=self.options.confidence_threshold,
        )
        drafting.close()
        return tree

    def close_cache(self, user_cache: Cache | None) -> Cache:
        """The cache to return: the user's own, brought up to date, if there is one; else this decoder's."""
        if user_cache is None:
            return self.cache
        self.cache.export_to(user_cache)
        return user_cache

    def _contemplate_nodes(self, tree: DraftTree) -> Tensor:
        """`(B, M)` long: which nodes carry a contemplate token this round."""
        if not self.contemplate:
            return tree.tokens[:, :0]
        count = self.options.contemplate_tokens
        return likeliest_ends(tree, tree.tokens.shape[1] if count is None else count)

    def _contemplate_embedding(self, features: Tensor) -> Tensor:
        return self.model.confu.contemplate_embedding(features)

    def _soft_prompts(self) -> Tensor:
        layer = self.model.confu
        weight = layer.prompt_weight()
        return weight if layer.soft_prompt_type == "kv" else soft_prompt_key_values(self.model, weight)

    def _accept(self, tree: DraftTree, logits: Tensor, input_ids: Tensor) -> Acceptance:
        acceptance = accept(
            tree,
            logits,
            input_ids,
            processors=self.processors,
            do_sample=self.do_sample,
            stopping_criteria=self.stopping_criteria,
            record=self.record,
            past_scores=self.scores if self.criteria_see_scores else None,
        )
        self.scores += acceptance.scores
        self.raw_logits += acceptance.raw_logits
        return acceptance


def root_only(tokens: Tensor) -> DraftTree:
    """The tree without drafted nodes over `tokens` `(B,)`: verifying it is a plain decoding step."""
    root = tokens[:, None]
    return DraftTree(
        root, torch.full_like(root, -1), torch.zeros_like(root), torch.zeros_like(root, dtype=torch.float)
    )


# Packed copies by model: they hold its layers, not the model itself, and go when it goes.
_packed: weakref.WeakKeyDictionary[PreTrainedModel, PackedLinears] = weakref.WeakKeyDictionary()


def packed_linears(
    model: PreTrainedModel, wanted: bool | None, dtype: torch.dtype | None = None
) -> AbstractContextManager:
    """Within it, `model` computes with packed weights, in `dtype`; see `TreeOptions.pack_weights`."""
    if wanted is None:
        wanted = model.device.type == "cpu" and model.get_memory_footprint() <= PACK_LIMIT_BYTES
    if not wanted:
        return nullcontext()
    packed = _packed.get(model)
    if packed is None or packed.is_stale():
        packed = _packed[model] = PackedLinears(model, dtype=dtype)
    return packed.active()


@torch.no_grad()
def confu_generate(
    model: PreTrainedModel,
    assistant: ConFuDraftModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    options: TreeOptions | None = None,
    *,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[GenerateDecoderOnlyOutput | Tensor, GenerationStats]:
    """Generate with draft trees; the text is that of plain decoding with the same arguments.

    Args:
        input_ids: `(1, n)` long. attention_mask: `(1, n)`, 0 = padding. cache: one that holds a prefix
            of `input_ids`; it is extended in place.
        logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate()`.

    Returns:
        What `generate()` returns, and the statistics of the call.
    """
    options = options or TreeOptions()
    decoder = Decoder(model, assistant, options, logits_processor, stopping_criteria, generation_config)
    state, acceptance = decoder.start(input_ids, attention_mask, cache)
    # What the draft guesses may be rounded, the target's word may not.
    draft_dtype = torch.bfloat16 if multiplies_bfloat16() else None
    pack = options.pack_weights
    with packed_linears(model, pack), packed_linears(assistant, pack, draft_dtype):
        while True:
            if streamer is not None:
                streamer.put(acceptance.tokens[0].cpu())
            if acceptance.finished:
                break
            state, acceptance = decoder.round(state)
    if streamer is not None:
        streamer.end()
    stats = decoder.tally.stats(state.input_ids.shape[1] - input_ids.shape[1])
    final_cache = decoder.close_cache(cache)
    if not generation_config.return_dict_in_generate:
        return state.input_ids, stats
    output = decoder_only_output(
        sequences=state.input_ids,
        scores=decoder.scores if generation_config.output_scores else None,
        logits=decoder.raw_logits if generation_config.output_logits else None,
        cache=final_cache,
    )
    return output, stats
