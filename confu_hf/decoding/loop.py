"""The decoding loop. A round: plan, draft a tree, verify it in one target forward, accept a path, keep its rows.

Here the parts meet; each does its own work in a file of its own. How `generate()` gets here, and what it refuses
before, is assistant/routing.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .. import host
from ..acceleration.decoding import accelerated
from ..acceleration.products import Products
from ..compat import decoder_only_output, pad_token, working_device
from ..target.cache import TreeCache
from ..target.exchange import export_cache, import_cache, length_of
from ..target.passes import Asked, Verified, prefill, verify
from ..tree.draft_tree import DraftTree, root_only
from ..tree.layout import VerifyLayout, verify_layout
from .acceptance import Acceptance, accept
from .batch import Batch, chains
from .contemplation import Contemplator
from .drafting import Drafter
from .outputs import Outputs
from .policy import Chosen, Policy
from .prompt import Prompt
from .rules import rules_for
from .state import DecodingState, Rows, append
from .stats import GenerationStats, RoundRecord, Stopwatch, Tally
from .sweep import Bench

# A cache gets room for this many more tokens at once; for longer answers it grows.
RESERVED_TOKENS = 1024


class Decoder:
    """One call of `generate`: the target and its cache, who drafts, who decides, and the rules for choosing tokens.

    Args:
        target: the model. layer_ids: whose entering hidden states are the features.
        drafter: proposes tokens. policy: decides what a round may spend.
        contemplator: None = EAGLE-3 mode.
        processors, stopping_criteria, generation_config: as `generate()` prepared them.
        windows: see `Outputs`.
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
        windows: Sequence[int | None] = (),
    ):
        self.target, self.layer_ids = target, layer_ids
        self.drafter, self.policy, self.contemplator = drafter, policy, contemplator
        self.processors, self.stopping_criteria = processors, stopping_criteria
        self.pad_token_id = pad_token(generation_config)
        self.returns_cache = bool(generation_config.return_dict_in_generate)
        self.do_sample = bool(generation_config.do_sample)
        self.max_length = getattr(stopping_criteria, "max_length", None)
        self.outputs = Outputs(generation_config, windows)
        self.batch: Batch | None = None
        self.without_ids = 0  # tokens of the prompt that have no id
        self.expect: Callable[[int], None] = lambda rows: None  # told of the rows of every verify pass beforehand
        self.tally, self.stopwatch = Tally(), Stopwatch(working_device(target))
        self.cache: TreeCache | None = None

    def products(self) -> Callable[[int], AbstractContextManager] | None:
        """Within it, the last rows of a pass get what a gated LoRA adds for contemplate tokens; None = nothing is added."""
        return None if self.contemplator is None or self.contemplator.low_rank is None else self.contemplator.acting

    def start(self, prompt: Prompt) -> tuple[DecodingState, Acceptance]:
        """Prefill, and the first token: a round whose tree is only its root, the prompt's last token."""
        input_ids, mask = prompt.input_ids, prompt.mask()
        batch_size, length = input_ids.shape
        self.batch = Batch(rules_for(self.processors, self.stopping_criteria, batch_size), length, self.pad_token_id)
        self.without_ids = prompt.without_ids
        self.returns_cache |= prompt.cache is not None
        self.cache = self._open_cache(prompt)
        past = self.cache.get_seq_length()
        prefilled = prefill(
            self.target,
            cache=self.cache,
            layer_ids=self.layer_ids,
            chunk_size=prompt.chunk_size,
            asked=self.outputs.asked,
            **prompt.behind(past),
        )
        self.cache.set_mask(mask)
        self.outputs.open(batch_size, prefilled.states)
        places = self.cache.next_positions()  # (B, 1), the root's
        lengths = (length,) * batch_size
        acceptance = self._accept(root_only(prompt.roots()), prefilled.logits[:, None], input_ids, lengths, None)
        state = DecodingState(
            input_ids=append(input_ids, lengths, acceptance.tokens, acceptance.counts),
            lengths=tuple(length + count for count in acceptance.counts),
            finished=acceptance.finished,
            features=prefilled.features[:, -1].clone(),  # a view would hold on to those of the whole prompt
            position_offset=prefilled.next_position_ids - places,
            max_length=self.max_length,
            emitted=acceptance.emitted,
        )
        position_ids = self.cache.slot_position_ids[:, past:].clone()
        position_ids[:, -1:] = places - 1  # the draft starts there, even from a masked token
        rows = Rows(acceptance.tokens, prefilled.features, position_ids, is_whole=bool(mask.all()))
        self._observe_prompt(state, rows, prompt, past)
        return self._end_rows(state), acceptance

    def _observe_prompt(self, state: DecodingState, rows: Rows, prompt: Prompt, past: int) -> None:
        """Tell the drafter of the prompt. `rows` lack the tokens that the prompt itself goes on with."""
        if prompt.inputs_embeds is None:
            tokens = torch.cat([prompt.input_ids[:, past - prompt.left_out + 1 :], rows.tokens], dim=1)
            self.drafter.observe(state, replace(rows, tokens=tokens))
            return
        older = (rows.features[:, :-1], rows.position_ids[:, :-1])
        self.drafter.read(prompt.inputs_embeds[:, past + 1 :], *older, is_whole=rows.is_whole)
        newest = (rows.tokens, rows.features[:, -1:], rows.position_ids[:, -1:])
        self.drafter.observe(state, Rows(*newest, is_whole=True))

    def round(self, state: DecodingState) -> tuple[DecodingState, Acceptance]:
        """Draft, verify, accept, keep."""
        timed = self.stopwatch.phase
        with timed("policy"):
            plan = self.policy.plan(state, self.tally.records)
        with timed("draft"):
            tree = self.drafter.grow(state, plan)
        with timed("policy"):
            chosen = self.policy.prune(state, tree, self.drafter.steps)
            tree = chosen.tree.to(state.input_ids.device)
        with timed("verify"):
            layout = self._layout(tree, chosen.contemplate_tokens, state)
        self.expect(layout.places.numel())  # what that takes, once a call, is no round's cost
        with timed("verify"):
            verified = self._verify(layout, state)
        with timed("accept"):
            rows = (verified.logits, state.input_ids, state.lengths, state.finished)
            acceptance = self._accept(tree, *rows, columns=(tree.looked_up, layout.contemplated))
        with timed("cache"):
            state = self._keep(state, tree, layout, verified, acceptance)
            state = self._end_rows(state)
        self.tally.records.append(self._record(chosen, layout, acceptance))
        return state, acceptance

    def _record(self, chosen: Chosen, layout: VerifyLayout, acceptance: Acceptance) -> RoundRecord:
        looked_up, contemplated = acceptance.marks
        return RoundRecord(
            accepted=acceptance.counts,
            nodes=layout.tokens.shape[1],
            contemplate_tokens=layout.contemplate_nodes.shape[1],
            seconds=self.stopwatch.read(),
            path=acceptance.nodes,
            ended=acceptance.finished,
            fresh=tuple(bool(row and row[-1]) for row in contemplated),
            forecasts=chosen.forecasts,
            looked_up=tuple(map(sum, looked_up)),
            contemplate_length=layout.contemplate_length,
        )

    def _layout(self, tree: DraftTree, contemplate_tokens: int | None, state: DecodingState) -> VerifyLayout:
        nodes = tree.tokens[:, :0]
        if self.contemplator is not None and contemplate_tokens != 0:
            nodes = self.contemplator.nodes(tree, contemplate_tokens)
        return verify_layout(
            tree,
            nodes,
            slot_position_ids=self.cache.slot_position_ids,
            soft_prompt_length=self.cache.soft_prompt_length if nodes.shape[1] else 0,
            contemplate_length=1 if self.contemplator is None else self.contemplator.length,
            lengths=self.cache.lengths,
            root_places=self.cache.next_positions(),
            position_offset=state.position_offset,
            has_gaps=self.cache.has_gaps,
        )

    def _verify(self, layout: VerifyLayout, state: DecodingState) -> Verified:
        count = layout.contemplate_rows
        if not count:
            return verify(self.target, layout, None, self.cache, self.layer_ids, self.outputs.asked)
        embedding = self.contemplator.embedding(state.features)
        with self.contemplator.acting(count):
            futures = self.contemplator.layer_ids
            return verify(self.target, layout, embedding, self.cache, self.layer_ids, self.outputs.asked, futures)

    def _keep(
        self, state: DecodingState, tree: DraftTree, layout: VerifyLayout, verified: Verified, acceptance: Acceptance
    ) -> DecodingState:
        """Commit the accepted path and tell the drafter of it."""
        path = acceptance.path
        features, position_ids = _rows_on(path, acceptance.counts, layout, verified)
        self._note_states(layout, verified, acceptance.nodes)
        self.cache.keep_path(path, acceptance.counts, acceptance.nodes)
        future, known = None, None
        if self.contemplator is not None:
            known = [any(row) for row in acceptance.marks[1]]
            future, known = self.contemplator.future(tree, layout.contemplate_nodes, verified, acceptance, known)
        state = state.advance(acceptance, features)
        whole = len(set(acceptance.counts)) == 1
        tokens = acceptance.tokens.clamp(min=0)
        self.drafter.observe(state, Rows(tokens, features, position_ids, future, known, is_whole=whole))
        return state

    def _note_states(self, layout: VerifyLayout, verified: Verified, nodes: Sequence[Sequence[int]]) -> None:
        """Keep what is asked for of the nodes that tokens were chosen at; before their rows are committed."""
        if self.outputs.asked != Asked():
            states, prompts = verified.states, layout.soft_prompt_length
            self.outputs.add_states(self.batch.rows, states, nodes, self.cache.lengths, prompts)

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
        outputs go on to the last step."""
        sequences = self.batch.sequences(state)
        self.cache.cut([length - 1 + self.without_ids for length in state.lengths])
        read = [length - self.without_ids for length in self.cache.lengths]
        if min(read) == sequences.shape[1] - 1:
            return
        tree, path, counts = chains(sequences, read)
        layout = self._layout(tree, 0, state)
        self.expect(layout.places.numel())
        verified = self._verify(layout, state)
        for row, length in enumerate(state.lengths):
            self.outputs.cut(row, length - self.batch.prompt_length)
        self._note_states(layout, verified, [range(count) for count in counts])
        self.cache.keep_path(path, counts)
        for row, count in enumerate(counts if self.outputs.keeps_scores else ()):
            for step in range(count):
                ids = sequences[row : row + 1, : state.lengths[row] + step]
                logits = verified.logits[row : row + 1, step].to(copy=True, dtype=torch.float32, device=ids.device)
                self.outputs.add_scores(row, [self.batch.processors[row](ids, logits)], [logits])

    def _open_cache(self, prompt: Prompt) -> TreeCache:
        layers = self.target.config.get_text_config(decoder=True).num_hidden_layers
        soft_prompts = None if self.contemplator is None else self.contemplator.soft_prompts()
        limit = prompt.length + RESERVED_TOKENS
        if self.max_length is not None:
            limit = min(self.max_length + self.without_ids, limit)
        if length_of(prompt.cache) > 0:
            return import_cache(prompt.cache, layers, soft_prompts, capacity=limit)
        return TreeCache(layers, soft_prompts, capacity=limit)

    def close_cache(self, user_cache: Cache | None) -> Cache:
        """The cache to return: the user's own, brought up to date, if there is one; else this decoder's."""
        if user_cache is None:
            return self.cache
        export_cache(self.cache, user_cache)
        return user_cache

    def _accept(self, tree, logits, input_ids, lengths, finished, columns=()) -> Acceptance:
        acceptance = accept(
            tree,
            logits,
            input_ids,
            lengths=lengths,
            finished=finished,
            processors=self.batch.processors,
            do_sample=self.do_sample,
            stopping_criteria=self.batch.rules.row_criteria,
            record=self.outputs.keeps_scores,
            past_scores=self.outputs.past_scores(),
            columns=columns,
        )
        for index, row in enumerate(self.batch.rows):
            self.outputs.add_scores(row, acceptance.scores[index], acceptance.raw_logits[index])
        return acceptance


def _rows_on(path: Tensor, counts: Sequence[int], layout: VerifyLayout, verified: Verified) -> tuple[Tensor, Tensor]:
    """Features `(B, P, 3 d)` and places `(B, P)` of the accepted nodes, -1 where there is none."""
    if layout.tokens.shape[1] == 1 and all(counts):  # a plain step: the root of every row
        return verified.features, layout.places[:, :1]
    index = path.clamp(min=0)[..., None].expand(-1, -1, verified.features.shape[-1])
    steps = torch.arange(path.shape[1], device=path.device)
    return verified.features.gather(1, index), torch.where(path >= 0, layout.places[:, :1] + steps, -1)


@torch.no_grad()
def confu_generate(
    decoder: Decoder,
    prompt: Prompt,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    *,
    pack_weights: bool | None = None,
    products: Products | None = None,
) -> tuple[GenerateDecoderOnlyOutput | Tensor, GenerationStats]:
    """Generate with draft trees; the text is that of plain decoding with the same arguments.

    Args:
        pack_weights: see `TreeOptions`. products: what `compile()` built, if it did.

    Returns:
        What `generate()` returns, and the statistics of the call.
    """
    has_all_ids = prompt.inputs_embeds is None and not prompt.left_out
    if has_all_ids:
        decoder.drafter.recall(prompt.cache, prompt.input_ids)
    state, acceptance = decoder.start(prompt)
    with accelerated(decoder.target, decoder.drafter.network, pack_weights, products) as acceleration:
        decoder.expect = acceleration.expect
        compiled = products.path.stem if acceleration.execution.compiled else False  # another library has other costs
        execution = f"pack_weights={pack_weights}, compiled={compiled}"
        models = (decoder.target, decoder.layer_ids, decoder.drafter.network)
        decoder.policy.prepare(Bench(*models, execution, acceleration.expect, decoder.products()))
        while True:
            if streamer is not None:
                streamer.put(host.hold(acceptance.emitted[0]))
            if all(state.finished):
                break
            state, acceptance = decoder.round(state)
        decoder.policy.finish()
        if decoder.returns_cache and len(state.lengths) > 1:
            decoder.read_padding(state)
    if streamer is not None:
        streamer.end()
    sequences = decoder.batch.sequences(state)
    new_tokens = sum(map(len, decoder.batch.written(state))) - prompt.input_ids.numel()
    stats = replace(decoder.tally.stats(new_tokens), **asdict(acceleration.execution))
    if decoder.returns_cache:
        cache = decoder.close_cache(prompt.cache)
        if has_all_ids:
            decoder.drafter.remember(cache, sequences)
    if not generation_config.return_dict_in_generate:
        return sequences, stats
    fields = decoder.outputs.by_step(sequences.shape[1] - prompt.input_ids.shape[1])
    return decoder_only_output(sequences=sequences, cache=cache, **fields), stats
