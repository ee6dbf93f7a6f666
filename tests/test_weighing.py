"""The parts of `policy="auto"`: how many nodes and contemplate tokens are best, pruning, and what is learned from rounds."""

from __future__ import annotations

import random
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confu_hf.acceleration.costs import CostModel
from confu_hf.decoding.cost_policy import CostPolicy
from confu_hf.decoding.experience import WINDOW, Calibration, Experience, FutureValue
from confu_hf.decoding.stats import PHASES, Forecast, RoundRecord, Tally
from confu_hf.decoding.weighing import best_number, ends_by_size, probabilities, ranked
from confu_hf.options import TreeOptions
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.pruning import prune


@settings(deadline=None)
@given(
    gains=st.lists(st.floats(0, 1), min_size=0, max_size=12).map(lambda values: sorted(values, reverse=True)),
    costs=st.lists(st.floats(0.01, 5), min_size=13, max_size=13),
    limit=st.integers(0, 12),
)
def test_the_number_of_nodes_is_the_best_of_all(gains, costs, limit):
    best = best_number(gains, limit, 1, costs.__getitem__)
    rates = [(1 + sum(gains[:number])) / costs[number] for number in range(min(limit, len(gains)) + 1)]
    assert best.tokens / best.seconds == pytest.approx(max(rates))


def test_a_step_of_the_cost_curve_is_jumped_over():
    """Nine rows cost twice what eight cost, and so do sixteen: no more than eight, or all of sixteen."""
    seconds = lambda nodes: 1.0 if nodes < 8 else 2.0  # noqa: E731
    assert best_number([0.5] * 7 + [0.01] * 8, 15, 1, seconds).nodes == 7
    assert best_number([0.5] * 15, 15, 1, lambda nodes: 1.0 if nodes < 8 else 1.5).nodes == 15


def test_probabilities_multiply_from_the_root_down():
    log_probs = torch.tensor([0.0, 0.5, 0.25, 0.5 * 0.8]).log().tolist()
    log_probs[0] = 0.0
    tree = ([-1, 0, 0, 1], [0, 1, 1, 2], [0, 0, 1, 0])
    calibrate = lambda p, depth, looked_up: p / (5 if looked_up else depth)  # noqa: E731
    drafted, expected, joint = probabilities(log_probs, *tree, calibrate)
    assert drafted == pytest.approx([1, 0.5, 0.25, 0.8])
    assert expected == pytest.approx([1, 0.5, 0.05, 0.4])
    assert joint == pytest.approx([1, 0.5, 0.05, 0.2])
    assert ranked([1.0, 0.5, 0.5, 0.7]) == [0, 3, 1, 2]


def test_pruning_keeps_a_tree():
    tree = DraftTree(
        tokens=torch.tensor([[9, 5, 6, 7, 8]]),
        parents=torch.tensor([[-1, 0, 0, 2, 3]]),
        depths=torch.tensor([[0, 1, 1, 2, 3]]),
        log_probs=torch.tensor([[0.0, -3.0, -1.0, -2.0, -4.0]]),
    )
    pruned = prune(tree, torch.tensor([[0, 2, 3]]))
    assert pruned.tokens.tolist() == [[9, 6, 7]]
    assert pruned.parents.tolist() == [[-1, 0, 1]]
    assert pruned.depths.tolist() == [[0, 1, 2]]
    assert pruned.log_probs.tolist() == [[0.0, -1.0, -2.0]]


def test_a_forecast_tells_only_of_nodes_whose_parent_was_accepted():
    forecast = Forecast((-1, 0, 0, 1, 2), (0, 1, 1, 2, 2), (1.0,) * 5, (1.0,) * 5, (False,) * 5)
    assert forecast.outcomes((0, 2)) == [(1, False), (2, True), (4, False)]


def test_calibration_learns_per_depth_and_confidence_and_forgets():
    calibration = Calibration()
    assert calibration(0.7, 1) == 0.7
    for number in range(400):
        calibration.learn(0.7, 1, number % 2 == 0)
        calibration.learn(0.7, 2, False)
    assert calibration(0.7, 1) == pytest.approx(0.5, abs=0.05)
    assert calibration(0.7, 2) < 0.05
    assert calibration(0.7, 3) == pytest.approx(0.25, abs=0.05), "never seen: as all depths together"
    assert calibration(0.2, 1) == 0.2, "another confidence"
    for _ in range(int(3 * WINDOW / 0.7)):
        calibration.learn(0.7, 1, True)
    assert calibration(0.7, 1) > 0.65
    calibration.fade(0.0)
    assert calibration(0.7, 2) == 0.7


def test_what_was_looked_up_is_calibrated_apart():
    """A network that is always wrong beside a lookup that is always right, both sure of themselves at first."""
    policy = CostPolicy(TreeOptions(total_tokens=2, depth=1, top_k=1, contemplate=False), Experience())
    policy.costs = CostModel({1: 1.0, 8: 1.001}, draft_step=0.0, learns=False)
    tree = DraftTree(
        tokens=torch.tensor([[1, 2, 3]]),
        parents=torch.tensor([[-1, 0, 0]]),
        depths=torch.tensor([[0, 1, 1]]),
        log_probs=torch.tensor([[1.0, 0.55, 0.45]]).log(),
        looked_up=torch.tensor([[False, False, True]]),
    )
    state = SimpleNamespace(input_ids=torch.zeros(1, 1), lengths=(9,), finished=(False,), max_length=None)
    history = []
    for _ in range(60):
        policy.plan(state, history)
        chosen = policy.prune(state, tree, steps=1)
        path = tuple(node for node, token in enumerate(chosen.tree.tokens[0].tolist()) if token != 2)
        seconds = {name: 0.2 for name in PHASES}
        history.append(
            RoundRecord((len(path),), chosen.tree.tokens.shape[1], 0, seconds, (path,), (False,), (), chosen.forecasts)
        )
    policy.plan(state, history)
    assert policy.calibration(0.55, 1) < 0.1 and policy.experience.lookup(0.45, 1) > 0.8
    assert policy.layers[0].value < 0.2, "what the network brings at this depth"
    stats = Tally(records=history).stats(0)
    assert max(found.observed for found in stats.reliability) == 0
    assert min(found.observed for found in stats.lookup_reliability) == 1


def test_the_worth_of_a_future_moves_slowly_from_what_is_believed_at_first():
    future, chance = FutureValue(), random.Random(0)
    first = future.share
    assert 0 < first < 0.2
    for _ in range(200):  # single rounds scatter by a token: 200 are no reason to stop asking
        future.learn(True, chance.gauss(0, 1), 1.0)
        future.learn(False, chance.gauss(0, 1), 1.0)
    assert first / 2 < future.share < 2 * first
    for _ in range(3000):
        future.learn(True, 0.5, 2.0)
        future.learn(False, -0.5, 2.0)
    assert 0.3 < future.share < 0.5, "a token more, where the network drafts two"
    for _ in range(8000):
        future.learn(True, -1.5, 2.0)
    assert future.share == 0


@pytest.mark.parametrize("worth, expected", [(0.0, 0), (0.3, 1), (0.6, 2)])
def test_a_contemplate_token_only_where_it_pays(worth, expected):
    """Rows cost a tenth of a round each, a round brings 1.7 tokens. The walk ends at one node with 0.7, at the root else."""
    futures = [[worth], [0.7 * worth, worth]]
    best = best_number([0.7], 1, 1, lambda more: 1.0 + more / 10, futures)
    assert (best.nodes, best.contemplate_tokens) == (1, expected)
    assert best.tokens == pytest.approx(1.7) and best.seconds == pytest.approx(1.1 + expected / 10)


@pytest.mark.parametrize(
    ("beside", "length", "expected"), [(0.0, 1, 2), (0.15, 1, 2), (0.3, 1, 0), (0.0, 2, 1), (0.2, 4, 0)]
)
def test_a_contemplated_node_costs_its_rows_and_what_comes_with_any(beside, length, expected):
    """As above, worth 0.6: each node takes `length` rows, and the first one brings `beside` seconds with it."""
    futures = [[0.6], [0.42, 0.6]]
    best = best_number([0.7], 1, 1, lambda more: 1.0 + more / 10, futures, length, beside)
    assert (best.nodes, best.contemplate_tokens) == (1, expected)
    assert best.seconds == pytest.approx(1.1 + length * expected / 10 + (beside if expected else 0.0))


def test_rows_up_to_a_step_of_the_cost_curve_are_filled():
    """Eight rows cost what one costs, nine twice that. Nodes and contemplate tokens share the seven beside the root."""
    seconds = lambda more: 1.0 if more < 8 else 2.0  # noqa: E731
    futures = [[0.03 * (1 - 0.5**count) for count in range(1, 9)]] * 9
    few = best_number([0.5, 0.25], 30, 1, seconds, futures[:3])
    assert (few.nodes, few.contemplate_tokens) == (2, 5), "nothing else to do with them"
    many = best_number([0.5, *[0.012, 0.011, 0.010, 0.009, 0.008, 0.007, 0.0001]], 30, 1, seconds, futures)
    assert (many.nodes, many.contemplate_tokens) == (6, 1), "the first token is worth more than the last node"
    assert best_number([0.5] * 7, 30, 1, seconds, futures[:8]).contemplate_tokens == 0


@settings(deadline=None)
@given(
    gains=st.lists(st.floats(0, 1), max_size=8).map(lambda values: sorted(values, reverse=True)),
    costs=st.lists(st.floats(0.01, 1), min_size=17, max_size=17).map(accumulate).map(list),
    worths=st.lists(
        st.lists(st.floats(0, 0.3), min_size=8, max_size=8).map(accumulate).map(list), min_size=9, max_size=9
    ),
)
def test_nodes_and_contemplate_tokens_are_the_best_of_all(gains, costs, worths):
    futures = [row[: number + 1] for number, row in enumerate(worths)]
    best = best_number(gains, 8, 1, costs.__getitem__, futures)
    rates = {
        (number, count): (1 + sum(gains[:number]) + (0.0, *futures[number])[count]) / costs[number + count]
        for number in range(len(gains) + 1)
        for count in range(len(futures[number]) + 1)
    }
    assert rates[best.nodes, best.contemplate_tokens] == pytest.approx(max(rates.values()))


@settings(deadline=None)
@given(parents=st.lists(st.integers(0, 8), max_size=8), shares=st.lists(st.floats(0, 0.5), min_size=8, max_size=8))
def test_ends_of_a_tree_are_those_of_its_nodes(parents, shares):
    parents, joint = [-1, *(parent % (node + 1) for node, parent in enumerate(parents))], [1.0]
    for parent, share in zip(parents[1:], shares, strict=False):
        joint.append(joint[parent] * share)
    sizes = ends_by_size(joint, parents, 5)
    assert len(sizes) == min(6, len(joint))
    for number, ends in enumerate(sizes):
        kept = ranked(joint)[: number + 1]
        expected = [joint[node] - sum(joint[child] for child in kept if parents[child] == node) for node in kept]
        assert ends == pytest.approx(sorted((max(0.0, end) for end in expected), reverse=True))
