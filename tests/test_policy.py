"""What a round may spend: simulated with a clock of its own, and in `generate`, where it must not change the text."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from assisted_calls import PROMPT, plain
from oracles import make_assistant, make_oracle
from simulated_rounds import Simulation
from tiny_models import tiny_llama

from confu_hf.acceleration.costs import CostModel
from confu_hf.decoding.cost_policy import REFRESH, CostPolicy
from confu_hf.decoding.experience import Experience, FutureValue
from confu_hf.decoding.sweep import Bench
from confu_hf.options import TreeOptions
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.ends import likeliest_ends

SEEDS = range(4)
FREE_ROWS = {1: 1.0, 8: 1.0, 16: 1.1}  # a machine on which drafting pays


def steep(rows):
    return 0.040 + 0.0055 * (rows - 1)


# 1. Simulated calls


MACHINES = {
    "flat": {},
    "steep": {"verify": steep},
    "dear": {"verify": steep, "step": 0.012},  # draft steps of 30 % of a plain round, thought to take 10 %
    "beforehand": {"verify": steep, "step": 0.012, "device_type": "cuda"},
}


@pytest.mark.parametrize("confidence", [0.9, 0.5, 0.15])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("contemplate", [True, False])
def test_a_useless_draft_costs_three_percent_at_most(confidence, machine, contemplate):
    options = TreeOptions(total_tokens=30, depth=5, top_k=6, contemplate=contemplate)
    for seed in SEEDS[:2]:
        call = Simulation(confidence, lambda token: 0.0, options, seed=seed, **MACHINES[machine]).run(256)
        assert call.speed > 0.97
        assert sum(record.nodes > 1 for record in call.records[128:]) < 10


def test_what_is_at_stake_grows_with_what_was_accepted():
    """A step costs a quarter of a plain round, a row a tenth, and at first 0.6 may be lost."""
    for proof, depth, nodes in ((0.0, 1, 3), (5.0, 5, 6)):
        policy = CostPolicy(TreeOptions(depth=5, contemplate=False), Experience(proof=proof))
        policy.costs = CostModel({1: 1.0, 11: 2.0}, draft_step=0.25, learns=False)
        chosen = one_step(policy, [0.9] * 6, device_type="cuda")
        assert policy.planned.depth == depth
        assert chosen.tree.tokens.shape[1] - 1 == nodes


def test_a_draft_that_is_right_is_used_in_full():
    calls = [Simulation(0.95, lambda token: 0.95, seed=seed).run(256) for seed in SEEDS]
    fixed = 256 / (256 / 4.4) * 0.070 / (0.070 + 4 * 0.0025 + 4 * 0.008)  # every round four nodes deep
    assert statistics.mean(call.speed for call in calls) > 0.9 * fixed
    depths = [record.nodes - 1 for call in calls for record in call.records[4:]]
    assert statistics.median(depths) == 4


def test_a_draft_that_is_sure_of_itself_and_half_right_is_not_believed():
    calls = [Simulation(0.9, lambda token: 0.5, seed=seed).run(512) for seed in SEEDS]
    assert statistics.mean(call.speed for call in calls) > 1.2
    for call in calls:
        outcomes = [
            (record.forecasts[0].expected[node], accepted)
            for record in call.records[len(call.records) // 2 :]
            if record.forecasts
            for node, accepted in record.forecasts[0].outcomes(record.path[0])
            if record.forecasts[0].drafted[node] > 0.8
        ]
        expected, observed = (statistics.mean(column) for column in zip(*outcomes, strict=True))
        assert abs(expected - observed) < 0.15 < 0.9 - observed


def test_a_text_that_turns_predictable_halfway_is_drafted_for_again():
    for seed in SEEDS:
        call = Simulation(0.9, lambda token: 0.9 if token >= 256 else 0.0, seed=seed).run(256)
        before = call.seconds
        assert sum(record.nodes > 1 for record in call.records[-64:]) < 8, "paused"
        call.run(256)
        again = [record.nodes > 1 for record, start in zip(call.records, call.starts, strict=True) if start >= 320]
        assert statistics.mean(again) > 0.8
        assert 256 * 0.070 / (call.seconds - before) > 1.4


def test_pauses_grow_and_shrink():
    useless = Simulation(0.9, lambda token: 0.0).run(300)
    drafted = [start for start, record in zip(useless.starts, useless.records, strict=True) if record.forecasts]
    gaps = [later - earlier for earlier, later in zip(drafted, drafted[1:], strict=False)]
    assert min(gaps[-3:]) > 16 > gaps[0]
    useless.right = lambda token: 0.9
    useless.run(256)
    assert useless.policy.pause < min(gaps[-3:])


def test_without_a_draft_that_is_asked_in_between_the_depth_follows_from_rounds_before():
    good = Simulation(0.95, lambda token: 0.95, device_type="cuda").run(512)
    assert good.speed > 2
    poor = Simulation(0.5, lambda token: 0.3, device_type="cuda").run(512)
    assert poor.speed > 0.97
    assert statistics.median(max(record.forecasts[0].depths) for record in poor.records if record.forecasts) == 1


def test_a_plain_round_is_timed_now_and_then():
    call = Simulation(0.95, lambda token: 0.95).run(1500)
    plain_rounds = [number for number, record in enumerate(call.records) if not record.forecasts]
    new_ranges = [next(n for n, start in enumerate(call.starts) if 100 + start > length) for length in (512, 1024)]
    assert plain_rounds == [1, *new_ranges, new_ranges[-1] + REFRESH + 1], (
        "once in every range of contexts, then again"
    )


# 2. One step of the policy


def one_step(policy, chances, looked_up=False, device_type="cpu"):
    """The policy's choice of a tree of siblings, as it stands."""
    number = len(chances) + 1
    tree = DraftTree(
        tokens=torch.arange(1, number + 1)[None],
        parents=torch.tensor([[-1] + [0] * (number - 1)]),
        depths=torch.tensor([[0] + [1] * (number - 1)]),
        log_probs=torch.tensor([[1.0, *chances]]).log(),
        looked_up=torch.tensor([[False] + [looked_up] * (number - 1)]),
    )
    ids = SimpleNamespace(device=SimpleNamespace(type=device_type))
    state = SimpleNamespace(input_ids=ids, lengths=(9,), finished=(False,), max_length=None)
    policy.rounds = 1
    policy.planned = policy.plan(state, [])
    return policy.prune(state, tree, steps=1)


def test_contemplate_tokens_go_where_walks_are_expected_to_end():
    """A draft that says 0.85 and is right in a few percent: the walk ends at the root, whatever the draft says."""
    policy = CostPolicy(TreeOptions(contemplate_tokens=1), Experience())
    policy.costs = CostModel({1: 1.0, 8: 1.0001}, draft_step=0.0, learns=False)
    believed = one_step(policy, (0.85, 0.05))
    assert likeliest_ends(believed.tree, believed.contemplate_tokens).tolist() == [[1]]
    for _ in range(200):
        policy.calibration.learn(0.85, 1, False)
    chosen = one_step(policy, (0.85, 0.05))
    assert likeliest_ends(chosen.tree, chosen.contemplate_tokens).tolist() == [[0]]


def test_a_future_is_worth_what_the_network_drafts():
    """None where everything is looked up: the next round will not ask the network either."""
    counts = []
    for looked_up in (False, True):
        policy = CostPolicy(TreeOptions(), Experience())
        policy.costs = CostModel({1: 1.0, 101: 1.5}, draft_step=0.0, learns=False)
        counts.append(one_step(policy, (0.6, 0.3), looked_up).contemplate_tokens)
    assert counts[0] >= 1 and counts[1] == 0


def in_blocks(rows):
    """Weights are read once for eight rows."""
    return 0.040 + 0.0004 * (rows - 1) + 0.012 * ((rows - 1) // 8)


def test_contemplation_pays_where_rows_are_cheap_and_costs_nothing_where_it_is_useless():
    speeds = {}
    for future, contemplate in ((0.1, True), (0.1, False), (0.0, True), (0.0, False)):
        options = TreeOptions(depth=4, top_k=6, contemplate=contemplate)
        machine = {"verify": in_blocks, "step": 0.002, "future": future}
        calls = [Simulation(0.6, lambda token: 0.55, options, seed=seed, **machine).run(400) for seed in SEEDS[:2]]
        speeds[future, contemplate] = statistics.mean(call.speed for call in calls)
        asked = statistics.mean(record.contemplate_tokens for call in calls for record in call.records)
        assert (1 < asked < 6) if contemplate else asked == 0
    assert speeds[0.1, True] > 1.05 * speeds[0.1, False]
    assert speeds[0.0, True] > 0.98 * speeds[0.0, False]


@pytest.mark.parametrize(("dearer", "share"), [(0.0, 1 / 33), (0.05, 0.01)])
def test_futures_that_do_not_pay_are_tried_as_rarely_as_they_are_dear(dearer, share, monkeypatch):
    """0.5 % of the time, over calls: a round here takes about 0.06 seconds, so 0.05 more are risked in one of 170."""
    monkeypatch.setattr(FutureValue, "share", property(lambda self: 0.0))
    options = TreeOptions(depth=3, top_k=4, contemplate=True)
    call = Simulation(0.6, lambda token: 0.55, options, verify=lambda rows: 0.05 * rows**0.1, step=0.002)
    call.policy.costs.contemplation = dearer
    call.run(3000)
    tried = [number for number, record in enumerate(call.records) if record.contemplate_tokens]
    assert tried and tried[0] >= 32
    assert 0.3 * share < len(tried) / len(call.records) <= share


def test_a_batch_is_planned_as_a_whole():
    """Every row keeps its own best nodes, as many as the others; a row that has ended has no say."""
    policy = CostPolicy(TreeOptions(total_tokens=3, depth=1, top_k=3, contemplate=False), Experience())
    policy.costs = CostModel({1: 1.0, 2: 1.0, 4: 1.2, 6: 1.9, 8: 2.6}, draft_step=0.0, learns=False)
    tree = DraftTree(
        tokens=torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]),
        parents=torch.tensor([[-1, 0, 0, 0]] * 2),
        depths=torch.tensor([[0, 1, 1, 1]] * 2),
        log_probs=torch.tensor([[1.0, 0.1, 0.8, 0.1], [1.0, 0.6, 0.3, 0.1]]).log(),
    )
    for finished, nodes in [((False, False), [[1, 3], [1, 2]]), ((False, True), [[1, 3], [1, 2]])]:
        state = SimpleNamespace(input_ids=torch.zeros(2, 1), lengths=(9, 7), finished=finished, max_length=None)
        policy.plan(state, [])
        chosen = policy.prune(state, tree, steps=1)
        assert chosen.tree.tokens.tolist() == nodes
        assert policy.round.best.tokens == pytest.approx(3.4 if not any(finished) else 1.8)
        assert len(chosen.forecasts) == 2


# 3. In generate


@pytest.mark.parametrize(
    "options", [{}, {"contemplate": False}, {"contemplate_tokens": 1, "confidence_threshold": 0.01}]
)
def test_greedy_is_identical_and_limits_are_kept(options):
    model = tiny_llama()
    assistant = make_oracle(model)
    assistant.costs = CostModel(FREE_ROWS, draft_step=0.01, learns=False)
    arguments = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
    limits = {"policy": "auto", "total_tokens": 9, "depth": 3, "draft_top_k": 4}
    expected = plain(model, **arguments)
    got = model.generate(PROMPT, assistant_model=assistant, **limits, **options, **arguments)
    assert torch.equal(got, expected)
    stats = assistant.stats
    assert stats.mean_accepted_length > 2
    for record in stats.records:
        assert record.nodes <= 10 and record.accepted[0] <= 4
        assert record.contemplate_tokens <= options.get("contemplate_tokens", 10) * options.get("contemplate", True)
    assert sum(found.count for found in stats.reliability) > 20
    assert all(0 <= found.observed <= 1 and 0 <= found.expected <= 1 for found in stats.reliability)


def test_sampling_is_seed_exact():
    model = tiny_llama()
    assistant = make_oracle(model)
    assistant.costs = CostModel(FREE_ROWS, draft_step=0.01, learns=False)
    accepted = []
    for seed in range(12):
        arguments = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 12}
        torch.manual_seed(seed)
        expected = plain(model, **arguments)
        torch.manual_seed(seed)
        got = model.generate(PROMPT, assistant_model=assistant, policy="auto", total_tokens=6, depth=2, **arguments)
        assert torch.equal(got, expected)
        accepted.append(assistant.stats.mean_accepted_length)
    assert max(accepted) > 1.3


def test_measuring_at_first_use_leaves_no_trace():
    """The sweep runs passes of the target on a cache of its own, and draws no random number."""
    model = tiny_llama()
    assistant = make_assistant(model)
    arguments = {"do_sample": True, "temperature": 1.1, "max_new_tokens": 24}
    torch.manual_seed(3)
    expected = plain(model, **arguments)
    torch.manual_seed(3)
    got = model.generate(PROMPT, assistant_model=assistant, policy="auto", **arguments)
    assert torch.equal(got, expected)
    (costs,) = assistant.experience.costs.values()
    assert costs.verify(1, 0) > 0 and costs.draft(2, 0, 8) > 0
    model.generate(PROMPT, assistant_model=assistant, policy="auto", max_new_tokens=8)
    assert [*assistant.experience.costs.values()] == [costs], "measured once"


def test_the_bench_runs_as_many_rows_as_it_is_asked_for(monkeypatch):
    model = tiny_llama()
    seen = []
    forward = model.forward

    def watched(*args, **kwargs):
        seen.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    bench = Bench(model, [2, 4, 5], None, "plain")
    assert all(bench.run(rows) > 0 for rows in (1, 2, 16))
    assert seen == [1, 2, 16]
    assert bench.draft_share() == 0


def test_what_a_gated_lora_adds_is_the_least_difference_of_passes(monkeypatch):
    model = tiny_llama()
    seconds = iter([9.0, 0.050, 0.041, 0.047, 0.040, 0.060, 0.043])  # with products, then with and without in turn
    bench = Bench(model, [2, 4, 5], None, "plain", acting=lambda rows: nullcontext())
    monkeypatch.setattr(bench, "run", lambda rows, products=0: next(seconds))
    assert bench.contemplation() == pytest.approx(0.007)
    assert Bench(model, [2, 4, 5], None, "plain").contemplation() is None


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_is_timed_where_there_is_one(lora_rank):
    model = tiny_llama()
    assistant = make_assistant(model, lora_rank=lora_rank, future_words=1)
    arguments = {"assistant_model": assistant, "policy": "auto", "max_new_tokens": 8}
    model.generate(PROMPT, contemplate=False, **arguments)
    (costs,) = assistant.experience.costs.values()
    assert costs.contemplation is None, "a call that does not contemplate has nothing to time"
    model.generate(PROMPT, **arguments)
    assert list(assistant.experience.costs.values()) == [costs]
    if not lora_rank:
        assert costs.contemplation is None
    else:
        assert costs.contemplation > 0, "dozens of calls take time, however small the products"


def test_no_draft_wanted_is_none_drafted():
    model = tiny_llama()
    assistant = make_assistant(model)
    got = model.generate(PROMPT, assistant_model=assistant, policy="auto", total_tokens=0, max_new_tokens=16)
    assert torch.equal(got, plain(model, max_new_tokens=16))
    assert all(record.nodes == 1 and record.contemplate_tokens == 0 for record in assistant.stats.records)


def test_an_unknown_policy_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="got policy='always', expected one of .*auto.*fixed"):
        model.generate(PROMPT, assistant_model=make_assistant(model), policy="always")
