"""The decoding loop. A round: plan, draft a tree, verify it in one target forward, accept a path, keep its rows.

Here the parts meet; each does its own work in a file of its own. How `generate()` gets here, and what it refuses
before, is assistant/routing.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..acceleration.decoding import accelerated
from ..acceleration.products import Products
from ..compat import decoder_only_output, pad_token, working_device
from ..target.cache import TreeCache
from ..target.exchange import export_cache, import_cache
from ..target.passes import Verified, prefill, verify
from ..tree.draft_tree import DraftTree, root_only
from ..tree.layout import VerifyLayout, verify_layout
from .acceptance import Acceptance, accept
from .batch import Batch, chains
from .contemplation import Contemplator
from .drafting import Drafter
from .policy import Chosen, Policy
from .rules import rules_for
from .state import DecodingState, Rows, append
from .stats import GenerationStats, RoundRecord, Stopwatch, Tally
from .sweep import Bench

# A cache gets room for this many more tokens at once; longer answers double it.
RESERVED_TOKENS = 1024


class Decoder:
    """One call of `generate`: the target and its cache, who drafts, who decides, and the rules for choosing tokens.

    Args:
        target: the model. layer_ids: whose entering hidden states are the features.
        drafter: proposes tokens. policy: decides what a round may spend.
        contemplator: None = EAGLE-3 mode.
        processors, stopping_criteria, generation_config: as `generate()` prepared them.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layer_ids: list[int],
        drafter: Drafter,
        policy: Policy,
        contemplator: Contemplator | None,
        processors: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ):
        self.target, self.layer_ids = target, layer_ids
        self.drafter, self.policy, self.contemplator = drafter, policy, contemplator
        self.processors, self.stopping_criteria = processors, stopping_criteria
        self.pad_token_id = pad_token(generation_config)
        self.returns_cache = bool(generation_config.return_dict_in_generate)
        self.do_sample = bool(generation_config.do_sample)
        self.max_length = getattr(stopping_criteria, "max_length", None)
        self.record = bool(
            generation_config.return_dict_in_generate
            and (generation_config.output_scores or generation_config.output_logits)
        )
        self.criteria_see_scores = bool(generation_config.output_scores)
        self.batch: Batch | None = None
        self.scores: list[tuple[Tensor, ...]] = []  # of each row, one (1, V) for every token
        self.raw_logits: list[tuple[Tensor, ...]] = []
        self.tally, self.stopwatch = Tally(), Stopwatch(working_device(target))
        self.cache: TreeCache | None = None

    def start(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        user_cache: Cache | None,
        position_ids: Tensor | None = None,
        prompt_inputs: Mapping[str, Any] | None = None,
    ) -> tuple[DecodingState, Acceptance]:
        """Prefill, and the first token: a round whose tree is only its root, the prompt's last token."""
        batch_size, length = input_ids.shape
        self.batch = Batch(rules_for(self.processors, self.stopping_criteria, batch_size), length, self.pad_token_id)
        self.scores, self.raw_logits = [()] * batch_size, [()] * batch_size
        self.returns_cache |= user_cache is not None
        self.cache = self._open_cache(length, user_cache)
        past = self.cache.get_seq_length()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_whole = bool(mask.all())
        prefilled = prefill(
            self.target,
            input_ids[:, past:],
            self.cache,
            self.layer_ids,
            # Without padding the model's fastest causal path needs no mask.
            attention_mask=None if is_whole and not prompt_inputs else mask,
            position_ids=None if position_ids is None else position_ids[..., past:],
            prompt_inputs=prompt_inputs,
        )
        self.cache.set_mask(mask)
        places = self.cache.next_positions()  # (B, 1), the root's
        lengths = (length,) * batch_size
        acceptance = self._accept(root_only(input_ids[:, -1]), prefilled.logits[:, None], input_ids, lengths, None)
        state = DecodingState(
            input_ids=append(input_ids, lengths, acceptance.tokens, acceptance.counts),
            lengths=tuple(length + count for count in acceptance.counts),
            finished=acceptance.finished,
            features=prefilled.features[:, -1],
            position_offset=prefilled.next_position_ids - places,
            max_length=self.max_length,
        )
        draft_positions = self.cache.slot_position_ids[:, past:].clone()
        draft_positions[:, -1:] = places - 1  # the draft starts there, even from a masked token
        tokens = torch.cat([input_ids[:, past + 1 :], acceptance.tokens], dim=1)
        self.drafter.observe(state, Rows(tokens, prefilled.features, draft_positions, is_whole=is_whole))
        return self._end_rows(state), acceptance

    def round(self, state: DecodingState) -> tuple[DecodingState, Acceptance]:
        """Draft, verify, accept, keep."""
        timed = self.stopwatch.phase
        with timed("policy"):
            plan = self.policy.plan(state, self.tally.records)
        with timed("draft"):
            tree = self.drafter.grow(state, plan)
        with timed("policy"):
            chosen = self.policy.prune(state, tree, self.drafter.steps)
            tree = chosen.tree
        with timed("verify"):
            layout = self._layout(tree, chosen.contemplate_tokens, state)
            verified = self._verify(layout, state)
        with timed("accept"):
            acceptance = self._accept(tree, verified.logits, state.input_ids, state.lengths, state.finished)
        with timed("cache"):
            state = self._keep(state, tree, layout, verified, acceptance)
            state = self._end_rows(state)
        self.tally.records.append(self._record(chosen, layout, acceptance))
        return state, acceptance

    def _record(self, chosen: Chosen, layout: VerifyLayout, acceptance: Acceptance) -> RoundRecord:
        seconds = self.stopwatch.read()
        # From here on a GPU has nothing left to do, and reading from it waits for nothing.
        path = acceptance.nodes
        contemplated = layout.contemplate_nodes.tolist()
        return RoundRecord(
            accepted=acceptance.counts,
            nodes=layout.tokens.shape[1],
            contemplate_tokens=layout.contemplate_nodes.shape[1],
            seconds=seconds,
            path=path,
            ended=acceptance.finished,
            fresh=tuple(row[-1] in nodes if row else False for row, nodes in zip(path, contemplated, strict=True)),
            forecasts=chosen.forecasts,
        )

    def _layout(self, tree: DraftTree, contemplate_tokens: int | None, state: DecodingState) -> VerifyLayout:
        nodes = tree.tokens[:, :0]
        if self.contemplator is not None:
            nodes = self.contemplator.nodes(tree, contemplate_tokens)
        return verify_layout(
            tree,
            nodes,
            slot_position_ids=self.cache.slot_position_ids,
            soft_prompt_length=self.cache.soft_prompt_length if nodes.shape[1] else 0,
            lengths=self.cache.lengths,
            root_places=self.cache.next_positions(),
            position_offset=state.position_offset,
            has_gaps=self.cache.has_gaps,
        )

    def _verify(self, layout: VerifyLayout, state: DecodingState) -> Verified:
        count = layout.contemplate_nodes.shape[1]
        if not count:
            return verify(self.target, layout, None, self.cache, self.layer_ids)
        embedding = self.contemplator.embedding(state.features)
        with self.contemplator.acting(count):
            return verify(self.target, layout, embedding, self.cache, self.layer_ids)

    def _keep(
        self, state: DecodingState, tree: DraftTree, layout: VerifyLayout, verified: Verified, acceptance: Acceptance
    ) -> DecodingState:
        """Commit the accepted path and tell the drafter of it."""
        path = acceptance.path
        features = verified.features.gather(
            1, path.clamp(min=0)[..., None].expand(-1, -1, verified.features.shape[-1])
        )
        position_ids = torch.where(path >= 0, layout.places[:, :1] + torch.arange(path.shape[1]).to(path), -1)
        self.cache.keep_path(path, acceptance.counts, acceptance.nodes)
        future, known = None, None
        if self.contemplator is not None:
            future, known = self.contemplator.future(tree, layout.contemplate_nodes, verified, acceptance)
        state = state.advance(acceptance, features)
        whole = len(set(acceptance.counts)) == 1
        tokens = acceptance.tokens.clamp(min=0)
        self.drafter.observe(state, Rows(tokens, features, position_ids, future, known, is_whole=whole))
        return state

    def _end_rows(self, state: DecodingState) -> DecodingState:
        """Rows that have ended leave; where the cache is returned they stay, since it holds all rows."""
        state = self.batch.stop(state)
        if self.returns_cache:
            return state
        state, kept = self.batch.leave(state)
        if kept is not None:
            self.cache.batch_select_indices(torch.tensor(kept, device=state.input_ids.device))
            self.drafter.select(kept)
        return state

    def read_padding(self, state: DecodingState) -> None:
        """Have rows that ended early read their padding, as in plain decoding: the cache holds rows of one length, and
        scores go on to the last step."""
        sequences = self.batch.sequences(state)
        self.cache.cut([length - 1 for length in state.lengths])
        read = self.cache.lengths
        if min(read) == sequences.shape[1] - 1:
            return
        tree, path, counts = chains(sequences, read)
        verified = self._verify(self._layout(tree, 0, state), state)
        self.cache.keep_path(path, counts)
        for row, count in enumerate(counts if self.record else ()):
            emitted = state.lengths[row] - self.batch.prompt_length
            self.scores[row], self.raw_logits[row] = self.scores[row][:emitted], self.raw_logits[row][:emitted]
            for step in range(count):
                ids = sequences[row : row + 1, : state.lengths[row] + step]
                logits = verified.logits[row : row + 1, step].to(copy=True, dtype=torch.float32, device=ids.device)
                self.scores[row] += (self.batch.processors[row](ids, logits),)
                self.raw_logits[row] += (logits,)

    def _open_cache(self, length: int, user_cache: Cache | None) -> TreeCache:
        layers = self.target.config.get_text_config(decoder=True).num_hidden_layers
        soft_prompts = None if self.contemplator is None else self.contemplator.soft_prompts()
        limit = length + RESERVED_TOKENS if self.max_length is None else min(self.max_length, length + RESERVED_TOKENS)
        if user_cache is not None and user_cache.get_seq_length() > 0:
            return import_cache(user_cache, layers, soft_prompts, capacity=limit)
        return TreeCache(layers, soft_prompts, capacity=limit)

    def close_cache(self, user_cache: Cache | None) -> Cache:
        """The cache to return: the user's own, brought up to date, if there is one; else this decoder's."""
        if user_cache is None:
            return self.cache
        export_cache(self.cache, user_cache)
        return user_cache

    def _accept(self, tree, logits, input_ids, lengths, finished) -> Acceptance:
        acceptance = accept(
            tree,
            logits,
            input_ids,
            lengths=lengths,
            finished=finished,
            processors=self.batch.processors,
            do_sample=self.do_sample,
            stopping_criteria=self.batch.rules.row_criteria,
            record=self.record,
            past_scores=self.scores[0] if self.criteria_see_scores and len(self.scores) == 1 else None,
        )
        for index, row in enumerate(self.batch.rows):
            self.scores[row] += acceptance.scores[index]
            self.raw_logits[row] += acceptance.raw_logits[index]
        return acceptance


@torch.no_grad()
def confu_generate(
    decoder: Decoder,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    *,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    position_ids: Tensor | None = None,
    prompt_inputs: Mapping[str, Any] | None = None,
    pack_weights: bool | None = None,
    products: Products | None = None,
) -> tuple[GenerateDecoderOnlyOutput | Tensor, GenerationStats]:
    """Generate with draft trees; the text is that of plain decoding with the same arguments.

    Args:
        input_ids: `(B, n)` long. attention_mask: `(B, n)`, 0 = padding. cache: one that holds a prefix of `input_ids`;
            it is extended in place.
        position_ids, prompt_inputs: of the prompt, see [`prefill`]; None = as the mask counts, and none.
        pack_weights: see `TreeOptions`. products: what `compile()` built, if it did.

    Returns:
        What `generate()` returns, and the statistics of the call.
    """
    decoder.drafter.recall(cache, input_ids)
    state, acceptance = decoder.start(input_ids, attention_mask, cache, position_ids, prompt_inputs)
    with accelerated(decoder.target, decoder.drafter.network, pack_weights, products) as acceleration:
        execution = f"pack_weights={pack_weights}, compiled={acceleration.compiled}"
        decoder.policy.prepare(Bench(decoder.target, decoder.layer_ids, decoder.drafter.network, execution))
        while True:
            if streamer is not None:
                streamer.put(acceptance.tokens[0].cpu())
            if all(state.finished):
                break
            state, acceptance = decoder.round(state)
        decoder.policy.finish()
        if decoder.returns_cache and len(state.lengths) > 1:
            decoder.read_padding(state)
    if streamer is not None:
        streamer.end()
    sequences = decoder.batch.sequences(state)
    new_tokens = sum(map(len, decoder.batch.written(state))) - input_ids.numel()
    stats = replace(decoder.tally.stats(new_tokens), **asdict(acceleration))
    if decoder.returns_cache:
        decoder.drafter.remember(decoder.close_cache(cache), sequences)
    if not generation_config.return_dict_in_generate:
        return sequences, stats
    steps = sequences.shape[1] - input_ids.shape[1]
    output = decoder_only_output(
        sequences=sequences,
        scores=by_step(decoder.scores, steps) if generation_config.output_scores else None,
        logits=by_step(decoder.raw_logits, steps) if generation_config.output_logits else None,
        cache=decoder.cache if cache is None else cache,
    )
    return output, stats


def by_step(rows: list[tuple[Tensor, ...]], steps: int) -> tuple[Tensor, ...]:
    """Of each row one `(1, V)` for every token -> one `(B, V)` for every step."""
    return tuple(torch.cat([row[step] for row in rows]) for step in range(steps))
