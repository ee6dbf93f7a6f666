"""Answers many prompts with a frozen target: continuous batching over key/value slots that are allocated once.

A batch has a fixed number of rows, each with a length of its own. A row whose answer ends takes the next request at
once. What the prompts are and what is made of the answers is the caller's business; no draft takes part.

    slots of the cache, by row      [ prefix | prompt | answer ...            ]
                                    [ prefix | longer prompt | answer ...     ]
                                      ^ the beginning that all requests share: computed once, never overwritten

Slot `s` of a row holds its position `s`, so a query at position `p` sees the slots `0 .. p`; what an earlier answer
left behind lies above `p`. Prefill writes all of a prompt but its last token, which the next decoding step takes as
its input: the LM head never runs on a prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .. import compat
from ..errors import refusal
from ..target.masks import model_mask
from ..target.support import check_supported

# A prefill pass takes prompts whose lengths differ by a quarter at most, and this many tokens, padding included: as many as
# keep a CPU's caches useful, or a GPU busy.
MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Request:
    """A prompt to answer: its token ids, a temperature (0 is greedy), and the seed that its answer depends on."""

    tokens: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """`tokens` of the answer to the request number `index`, without the end token; `finished` says there was one."""

    index: int
    tokens: list[int]
    finished: bool


class SlotLayer(compat.CacheLayerMixin):
    """Keys and values of one layer, `(rows, kv_heads, capacity, head_dim)`; written in place, handed out as views."""

    is_sliding = False
    is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a SlotLayer is made by its SlotCache, which knows the number of rows")

    def reserve(self, like: tuple[Tensor, Tensor], rows: int, capacity: int) -> None:
        """Make room for `capacity` slots of `rows` rows. New slots are zero: masked, but they must be finite."""
        states = []
        for old, new in zip((self.keys, self.values), like, strict=True):
            buffer = new.new_zeros(rows, new.shape[1], capacity, new.shape[3])
            if old is not None:
                buffer[:, :, : old.shape[2]] = old
            states.append(buffer)
        self.keys, self.values = states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a SlotLayer is written through its SlotCache, which knows rows and slots")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A cache whose rows have lengths of their own: each forward pass writes where [`point`] said.

    Args:
        num_layers: layers of the model.
        rows: rows of the batch.
        block_size: slots added when a row needs more than there are.
    """

    def __init__(self, num_layers: int, rows: int, block_size: int = 256) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(num_layers)])
        self.rows, self.block_size = rows, block_size
        self._rows: Tensor | None = None
        self._slots: Tensor | None = None
        self._stop = 0

    def point(self, rows: Tensor | None, slots: Tensor, stop: int) -> None:
        """The next forward pass has the batch rows `rows` `(n,)` (None: all), writes its `Q` tokens to `slots`
        `(n or 1, Q)` of each and attends to the slots `0 .. stop - 1`."""
        self._rows, self._slots, self._stop = rows, slots, stop

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write `(n, kv_heads, Q, head_dim)`; returns `(n, kv_heads, stop, head_dim)`, views if all rows take part."""
        layer = self.layers[layer_idx]
        if layer.get_seq_length() < self._stop:
            capacity = -(-self._stop // self.block_size) * self.block_size
            layer.reserve((key_states, value_states), self.rows, capacity)
        rows = self._rows if self._rows is not None else torch.arange(self.rows, device=key_states.device)
        visible = []
        for buffer, states in ((layer.keys, key_states), (layer.values, value_states)):
            buffer[rows[:, None], :, self._slots] = states.transpose(1, 2)  # (n, Q, kv_heads, head_dim)
            shown = buffer[:, :, : self._stop]
            visible.append(shown if self._rows is None else shown[self._rows])
        return visible[0], visible[1]

    def repeat_first_row(self, length: int) -> None:
        """Copy the slots `0 .. length - 1` of row 0 to all rows."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[1:, :, :length] = buffer[:1, :, :length]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` `(n,)`, which become the rows `0 .. n - 1`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.rows = len(rows)


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor, top_k: int = 0) -> Tensor:
    """One token per row, `(B,)`: the most likely one where the temperature is 0, else by inversion of its uniform.

    Args:
        logits: `(B, V)`.
        temperatures: `(B,)`.
        uniforms: `(B,)` float64 in [0, 1).
        top_k: sample among so many of the most likely tokens; 0 means all.
    """
    tokens = logits.argmax(-1)
    rows = temperatures.nonzero()[:, 0]
    if not len(rows):
        return tokens
    logits, names = logits[rows], None
    if 0 < top_k < logits.shape[-1]:
        logits, names = logits.topk(top_k)  # both (rows, k)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = scaled / temperatures[rows, None].to(scaled.dtype)
    # float64: a sum over 50,000 tokens in float32 would round the rare ones away.
    cumulative = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniforms[rows, None] * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=cumulative.shape[-1] - 1)  # (rows, 1)
    tokens[rows] = (drawn if names is None else names.gather(1, drawn))[:, 0]
    return tokens


def shared_prefix(requests: Sequence[Request]) -> int:
    """Number of tokens that all requests begin with; the last token of a request does not count."""
    shortest, longest = min(request.tokens for request in requests), max(request.tokens for request in requests)
    limit = min(len(request.tokens) for request in requests) - 1
    pairs = zip(shortest[:limit], longest[:limit], strict=True)  # the extremes in order share what all share
    return next((index for index, (a, b) in enumerate(pairs) if a != b), limit)


def prefill_groups(lengths: Sequence[int], max_tokens: int = MAX_PREFILL_TOKENS["cpu"]) -> list[list[int]]:
    """Indices into `lengths`, in groups of similar length: `[10, 90, 11]` -> `[[0, 2], [1]]`. Zeros are left out."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        if length == 0:
            continue
        similar = groups and 4 * length <= 5 * lengths[groups[-1][0]] + 32
        if not similar or (len(groups[-1]) + 1) * length > max_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


@dataclass
class _Row:
    """What one row is busy with; `index` is None while it waits for a request."""

    index: int | None = None
    length: int = 0  # slots written; the row's next input goes to this slot
    answer: list[int] = field(default_factory=list)


class Regenerator:
    """Answers requests with `model`, `batch_size` of them at a time.

    Tokens follow the model's own distribution at the request's temperature, cut to `top_k`; other processors of its
    generation config (top-p, repetition penalty) are not applied. A request's answer depends on the request alone, up to rounding.

    Args:
        model: any target that `check_supported` accepts, in eval mode.
        batch_size: rows computed together.
        max_new_tokens: an answer is cut off here.
        refill: rows that must be free before prompts are read, by default a sixteenth of them: several at a time make
            better matrix products.
        top_k: a sampled token is one of so many most likely ones; 0 means any.
        stop: asked before every step; once it says yes, open answers are handed out as they are, unfinished.

    Attributes:
        new_tokens: tokens made so far, end tokens and those of open answers included.

    Example:
        for answer in Regenerator(model, 64).answers([Request(tuple(ids), temperature=0.7, seed=1)]):
            print(tokenizer.decode(answer.tokens))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int = 128,
        max_new_tokens: int = 192,
        refill: int | None = None,
        top_k: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_supported(model)
        if refill is None:
            refill = max(1, batch_size // 16)
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("refill", refill)):
            if value < 1:
                raise refusal(name, got=value, expected="at least 1", fix="Pass a positive number.")
        self.model, self.batch_size, self.max_new_tokens, self.refill = model, batch_size, max_new_tokens, refill
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.top_k, self.stop, self.new_tokens = top_k, stop, 0

    @torch.inference_mode()
    def answers(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield an answer for each request, in the order in which they end. Put requests of similar length together:
        a step costs what its longest row costs."""
        for index, request in enumerate(requests):
            if not request.tokens:
                raise refusal(f"request {index}", got="no tokens", expected="at least one", fix="Leave it out.")
        if requests:
            yield from _Batch(self, requests).run()


class _Batch:
    """The rows of one call of `Regenerator.answers`."""

    def __init__(self, settings: Regenerator, requests: Sequence[Request]) -> None:
        self.settings, self.model, self.requests = settings, settings.model, requests
        self.device = self.model.device
        self.dtype = self.model.get_input_embeddings().weight.dtype
        self.config = self.model.config.get_text_config(decoder=True)
        self.waiting = deque(range(len(requests)))
        count = min(settings.batch_size, len(requests))
        self.rows = [_Row() for _ in range(count)]
        self.cache = SlotCache(self.config.num_hidden_layers, count)
        self.inputs = torch.zeros(count, dtype=torch.long, device=self.device)
        self.temperatures = torch.zeros(count, dtype=torch.float64, device=self.device)
        self.uniforms = torch.zeros(count, settings.max_new_tokens, dtype=torch.float64, device=self.device)
        self.prefix = shared_prefix(requests) if len(requests) > 1 else 0

    def run(self) -> Iterator[Answer]:
        if self.prefix:
            self._read([0], [self.requests[0].tokens[: self.prefix]], start=0)
            self.cache.repeat_first_row(self.prefix)
        self._clear(range(len(self.rows)))
        while True:
            # 1. Free rows take the next requests, once enough of them are free; at the end the batch shrinks.
            free = [number for number, row in enumerate(self.rows) if row.index is None]
            wanted = min(self.settings.refill, len(self.rows))
            if self.waiting and len(free) >= wanted:
                self._take_requests(free)
            elif not self.waiting and 2 * len(free) >= len(self.rows):
                self._shrink()
            if not self.rows:
                return
            if self.settings.stop():
                yield from (Answer(row.index, row.answer, False) for row in self.rows if row.answer)
                return
            # 2. One token for every row.
            tokens = self._step()
            # 3. Rows that ended hand out their answers.
            yield from self._collect(tokens)

    def _take_requests(self, free: list[int]) -> None:
        taken = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
        numbers = free[: len(taken)]
        bodies = [self.requests[index].tokens[self.prefix : -1] for index in taken]
        most = MAX_PREFILL_TOKENS.get(self.device.type, MAX_PREFILL_TOKENS["cuda"])
        for group in prefill_groups([len(body) for body in bodies], most):
            self._read([numbers[i] for i in group], [bodies[i] for i in group], start=self.prefix)
        for number, index in zip(numbers, taken, strict=True):
            request = self.requests[index]
            self.rows[number] = _Row(index, len(request.tokens) - 1)
            self.inputs[number] = request.tokens[-1]
            self.temperatures[number] = request.temperature
            if request.temperature > 0:
                generator = torch.Generator().manual_seed(request.seed)
                self.uniforms[number] = torch.rand(
                    self.settings.max_new_tokens, generator=generator, dtype=torch.float64
                )

    def _read(self, numbers: list[int], bodies: list[tuple[int, ...]], start: int) -> None:
        """Prefill: write the keys and values of `bodies`, padded on the right, to slots `start ..` of rows `numbers`.
        A padding token is above every position that the row's own tokens see, and is overwritten by the answer."""
        longest = max(map(len, bodies))
        padded = torch.tensor([[*body, *[body[-1]] * (longest - len(body))] for body in bodies], device=self.device)
        positions = torch.arange(start, start + longest, device=self.device)[None]  # (1, Q), alike in all rows
        self.cache.point(torch.tensor(numbers, device=self.device), positions, start + longest)
        decoder = self.model.get_decoder()
        decoder(
            input_ids=padded,
            attention_mask=self._mask(positions, start + longest),
            position_ids=positions.expand(len(bodies), -1),
            **compat.cache_keyword(decoder, self.cache),
            use_cache=True,
        )

    def _step(self) -> Tensor:
        """Feed every row its last token; returns the next ones, `(B,)`. Free rows compute along and are ignored."""
        lengths = torch.tensor([row.length for row in self.rows], device=self.device)
        steps = torch.tensor([len(row.answer) for row in self.rows], device=self.device)
        stop = max(row.length for row in self.rows) + 1
        positions = lengths[:, None]  # (B, 1)
        self.cache.point(None, positions, stop)
        output = self.model(
            input_ids=self.inputs[:, None],
            attention_mask=self._mask(positions, stop),
            position_ids=positions,
            **compat.cache_keyword(self.model, self.cache),
            use_cache=True,
        )
        uniforms = self.uniforms.gather(1, steps[:, None])[:, 0]
        self.inputs = sample(output.logits[:, -1], self.temperatures, uniforms, self.settings.top_k)
        return self.inputs

    def _mask(self, positions: Tensor, stop: int) -> Tensor | dict[str, Tensor]:
        """What queries at `positions` `(n, Q)` see of the slots `0 .. stop - 1`: those up to their own."""
        slots = torch.arange(stop, device=self.device)[None]  # (1, K)
        visible = slots[:, None] <= positions[..., None]  # (n, Q, K)
        return model_mask(self.config, visible, positions, slots, self.dtype)

    def _collect(self, tokens: Tensor) -> Iterator[Answer]:
        ended = []
        for number, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            if row.index is None:
                continue
            finished = token in self.settings.ends
            row.length += 1
            self.settings.new_tokens += 1
            if not finished:
                row.answer.append(token)
            if finished or len(row.answer) == self.settings.max_new_tokens:
                ended.append(number)
                yield Answer(row.index, row.answer, finished)
        self._clear(ended)

    def _clear(self, numbers: Sequence[int]) -> None:
        """Free rows compute along as short greedy ones: they lengthen no step and draw nothing."""
        for number in numbers:
            self.rows[number] = _Row(length=self.prefix)
            self.temperatures[number] = 0.0

    def _shrink(self) -> None:
        kept = [number for number, row in enumerate(self.rows) if row.index is not None]
        index = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.cache.keep_rows(index)
        self.rows = [self.rows[number] for number in kept]
        self.inputs, self.temperatures, self.uniforms = (
            states[index] for states in (self.inputs, self.temperatures, self.uniforms)
        )
