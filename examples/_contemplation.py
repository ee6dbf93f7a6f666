"""Where contemplation helped: each round drafted over again, with the future that the draft had and with it masked.

While a text is written, only where the draft stood before each round is noted; that costs nothing, so the times of a
trace stay true. Afterwards the draft goes back from the last round to the first: what it had committed by then is a
prefix of what it has now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from _rounds import WatchedConFu
from torch import Tensor
from transformers import PreTrainedModel

from confu_hf.decoding.drafting import Drafter, NetworkDrafter
from confu_hf.decoding.lookup import CombinedDrafter
from confu_hf.decoding.state import DecodingState, Rows
from confu_hf.options import ConFuGenerationConfig, TreeOptions
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.growing import grow_tree


@dataclass(frozen=True)
class Moment:
    """Where a draft stood before a round.

    Attributes:
        length: decided tokens, the root's included. waiting: rows that it had not read. committed: rows that it had.
    """

    length: int
    waiting: Rows
    committed: int


@dataclass(frozen=True)
class Guess:
    """What the network alone would have drafted in a round.

    Attributes:
        accepted: tokens that the round would have emitted, bonus included.
        first: the token that it thought likeliest. chance: the probability it gave to the token that came.
    """

    accepted: int
    first: int
    chance: float


@dataclass(frozen=True)
class Opinions:
    """The same round with the future that there was, and with it masked."""

    given: Guess
    masked: Guess


class TracedConFu(WatchedConFu):
    """A pair that can be asked afterwards what it would have drafted without a future."""

    network_drafter: NetworkDrafter
    moments: Sequence[Moment] = ()

    def new_drafter(self, target: PreTrainedModel, options: TreeOptions) -> Drafter:
        drafter = super().new_drafter(target, options)
        self.network_drafter = drafter.drafter if isinstance(drafter, CombinedDrafter) else drafter
        self.moments = []
        return drafter

    def before_round(self, state: DecodingState) -> None:
        network = self.network_drafter
        committed = network.cache.lengths[0] if network.cache.lengths else 0
        self.moments.append(Moment(state.lengths[0], Rows.joined(network.waiting), committed))


@torch.no_grad()
def second_opinions(assistant: TracedConFu, sequence: Tensor) -> list[Opinions | None]:
    """For each round of the last call, with trees as the assistant's options describe them; None where there was no future.

    Args:
        sequence: `(n,)` long, prompt and answer.
    """
    network, tokens = assistant.network_drafter, sequence.tolist()
    found: list[Opinions | None] = []
    for moment in reversed(assistant.moments):
        if moment.waiting.future is None:
            found.append(None)
            continue
        known = tokens[moment.length - 1 :]  # the root, and what followed
        masked = replace(moment.waiting, future=None, future_known=None)
        guesses = []
        for waiting in (moment.waiting, masked):
            if network.cache.lengths:
                network.cache.commit([moment.committed - network.cache.lengths[0]])
            network.waiting = [waiting]
            guesses.append(_guess(network, known, assistant.generation_config))
        found.append(Opinions(*guesses))
    return found[::-1]


def _guess(network: NetworkDrafter, known: Sequence[int], options: ConFuGenerationConfig) -> Guess:
    first: list[tuple[Tensor, Tensor]] = []

    def step(tokens: Tensor, parents: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        whole = network.draft.config.draft_vocab_size
        children, log_probs = network.step(tokens, parents, whole if parents is None else top_k)
        if parents is None:
            first.append((children[0, 0], log_probs[0, 0]))
        return children[..., :top_k], log_probs[..., :top_k]

    tree = grow_tree(
        step,
        torch.tensor(known[:1], device=network.draft.device),
        total_tokens=options.total_tokens,
        depth=options.depth,
        top_k=options.top_k,
        confidence_threshold=options.confidence_threshold,
    )
    children, log_probs = first[0]
    chance = log_probs[children == known[1]].exp().sum().item()  # 0 outside of the draft's vocabulary
    return Guess(_accepted(tree, known), int(children[0]), chance)


def _accepted(tree: DraftTree, known: Sequence[int]) -> int:
    """Tokens that a round with this tree would emit; `known` is the root and what followed."""
    pairs = zip(tree.parents[0].tolist(), tree.tokens[0].tolist(), strict=True)
    nodes = {pair: node for node, pair in reversed(list(enumerate(pairs)))}
    node, depth = 0, 0
    while depth + 2 < len(known) and (node, known[depth + 1]) in nodes:
        node, depth = nodes[node, known[depth + 1]], depth + 1
    return depth + 1
