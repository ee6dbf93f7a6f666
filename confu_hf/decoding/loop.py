"""The decoding loop of ConFu. A round: draft a tree, verify it in one target forward, accept a path, keep its rows,
draft on.

Positions: `v` is the newest position whose features are known, so the root of the tree is `x_{v+1}`, decided but not
    yet seen by the target.

Here the parts meet: `modeling_confu.py` drafts, `tree.py` picks nodes, `target.py` runs the target, `verification.py`
    accepts, `cache.py` keeps rows.
How `generate()` gets here, and what it refuses before, is `assisted.py`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..acceleration.packing import multiplies_bfloat16, packed_linears
from ..compat import decoder_only_output
from ..modeling_confu import ConFuDraftModel
from ..options import TreeOptions
from ..target.cache import TreeCache
from ..target.passes import prefill, verify
from ..target.soft_prompts import soft_prompt_key_values
from ..tree.draft_tree import DraftTree
from ..tree.ends import likeliest_ends, nearest_contemplated
from ..tree.growing import grow_tree
from ..tree.layout import verify_layout
from .acceptance import Acceptance, accept
from .drafting import DraftRound
from .state import DecodingState
from .stats import GenerationStats, Tally


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
