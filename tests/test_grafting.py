"""Grafting chains onto a tree, against a reference that knows paths instead of indices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confu_hf.tree.draft_tree import DraftTree, root_only
from confu_hf.tree.grafting import Chain, graft
from confu_hf.tree.pruning import prune

# Powers of two are exact as float32 log-probabilities would not be: joint "log-probabilities" are plain negative halves.
STEPS = st.sampled_from([0.0, -0.5, -1.0, -2.5])
TOKENS = st.integers(0, 3)


@st.composite
def trees(draw) -> DraftTree:
    """One random tree whose siblings differ, as drafters make them."""
    tokens, parents, depths, log_probs = [7], [-1], [0], [0.0]
    for _ in range(draw(st.integers(0, 9))):
        parent = draw(st.integers(0, len(tokens) - 1))
        token = draw(TOKENS)
        if (parent, token) in zip(parents, tokens, strict=True):
            continue
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        log_probs.append(log_probs[parent] + draw(STEPS))
    return DraftTree(*(torch.tensor([values]) for values in (tokens, parents, depths, log_probs)))


@st.composite
def some_chains(draw) -> list[Chain]:
    chains = []
    for _ in range(draw(st.integers(0, 4))):
        steps = draw(st.lists(st.tuples(TOKENS, STEPS), max_size=5))
        joint = [sum(step for _, step in steps[: end + 1]) for end in range(len(steps))]
        chains.append(Chain(tuple(token for token, _ in steps), tuple(joint)))
    return chains


def paths_looked_up(tree: DraftTree) -> set[tuple[int, ...]]:
    """Paths whose last token is flagged."""
    return {path for path, flag in zip(paths(tree), tree.looked_up[0, 1:].tolist(), strict=True) if flag}


def paths(tree: DraftTree, row: int = 0) -> dict[tuple[int, ...], float]:
    """The log-probability of every drafted node by the tokens that lead to it."""
    found = {0: ()}
    tokens, parents, depths, log_probs = (
        states[row].tolist() for states in (tree.tokens, tree.parents, tree.depths, tree.log_probs)
    )
    assert parents[0] == -1 and depths[0] == 0 and log_probs[0] == 0
    for node in range(1, len(tokens)):
        assert parents[node] < node, "parents come first"
        found[node] = (*found[parents[node]], tokens[node])
        assert len(found[node]) == depths[node]
    by_path = {path: log_probs[node] for node, path in found.items() if node}
    assert len(by_path) == len(tokens) - 1, "no path twice"
    return by_path


def union(tree: DraftTree, chains: list[Chain]) -> tuple[dict[tuple[int, ...], float], set[tuple[int, ...]]]:
    """What tree and chains propose together, the greater conditional probability for what both do; and the paths whose
    last token was looked up."""
    joint = paths(tree)
    steps = {path: log_prob - joint.get(path[:-1], 0.0) for path, log_prob in joint.items()}
    looked_up = set()
    for chain in chains:
        for end, (log_prob, above) in enumerate(zip(chain.log_probs, (0.0, *chain.log_probs), strict=False), start=1):
            path = chain.tokens[:end]
            if log_prob - above > steps.get(path, -math.inf):
                steps[path] = log_prob - above
                looked_up.add(path)
    return {path: sum(steps[path[:end]] for end in range(1, len(path) + 1)) for path in steps}, looked_up


@settings(deadline=None)
@given(trees(), some_chains(), st.integers(0, 12), st.sampled_from([0.0, 0.3]))
def test_the_best_nodes_of_both_are_kept(tree, chains, total_tokens, threshold):
    whole = graft(tree, [chains], total_tokens=total_tokens, confidence_threshold=threshold)
    grafted = paths(whole)
    proposed, looked_up = union(tree, chains)
    assert paths_looked_up(whole) == looked_up & grafted.keys() and not whole.looked_up[0, 0]
    for path, log_prob in grafted.items():
        assert log_prob == proposed[path]
        assert len(path) == 1 or path[:-1] in grafted
    if chains or len(proposed) > total_tokens:  # else the tree comes back as it was
        allowed = [log_prob for log_prob in proposed.values() if threshold == 0 or log_prob >= math.log(threshold)]
        assert sorted(grafted.values()) == sorted(sorted(allowed, reverse=True)[:total_tokens])


def test_a_shared_prefix_is_one_node():
    tree = DraftTree(*(torch.tensor([values]) for values in ([7, 1, 2], [-1, 0, 1], [0, 1, 2], [0.0, -1.0, -2.0])))
    grafted = graft(tree, [[Chain((1, 3), (-0.5, -3.0))]], total_tokens=9)
    assert grafted.tokens.tolist() == [[7, 1, 2, 3]] and grafted.parents.tolist() == [[-1, 0, 1, 1]]
    assert grafted.depths.tolist() == [[0, 1, 2, 2]]
    assert grafted.log_probs.tolist() == [[0.0, -0.5, -1.5, -3.0]], "what follows a likelier token is likelier"
    assert grafted.looked_up.tolist() == [[False, True, False, True]]
    assert grafted.log_probs.dtype == tree.log_probs.dtype
    assert graft(grafted, [[]], total_tokens=2).looked_up.tolist() == [[False, True, False]]
    assert prune(grafted, torch.tensor([[0, 1, 3]])).looked_up.tolist() == [[False, True, True]]


def test_rows_of_a_batch_are_filled_up():
    grafted = graft(root_only(torch.tensor([5, 6])), [[Chain((1, 2), (-0.5, -1.0))], []], total_tokens=4)
    assert grafted.tokens.tolist() == [[5, 1, 2], [6, 6, 6]] and grafted.parents[1].tolist() == [-1, 0, 0]
    assert grafted.log_probs[1].tolist() == [0.0, -math.inf, -math.inf] and not grafted.looked_up[1].any()
    assert grafted.looked_up.tolist() == [[False, True, True], [False, False, False]]


def test_refusals():
    with pytest.raises(ValueError, match="Chain: got 2 tokens .* expected one per token, 0 or less, never rising"):
        Chain((1, 2), (-1.0, -0.5))
    with pytest.raises(ValueError, match="graft: got 0 lists of chains for 1 trees, .* expected one list per tree"):
        graft(root_only(torch.tensor([5])), [], total_tokens=4)
