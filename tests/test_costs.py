"""Running estimates of what rounds cost, fed with numbers: no clock is read here, but for the way to and from disk."""

from __future__ import annotations

import json
import random

import pytest
from huggingface_hub import constants
from tiny_models import tiny_llama

from confu_hf import ConFuAssistant
from confu_hf.acceleration.cost_files import SWITCH, CostKey, cost_folder, load_costs, save_costs
from confu_hf.acceleration.costs import FADING, CostModel, Curve, group

ROWS = (1, 16, 8, 4, 32, 2)


def swept(seconds=lambda rows: 0.04 + 0.002 * rows, budget=100.0, **arguments) -> CostModel:
    costs = CostModel()
    costs.sweep(seconds, ROWS, budget, **arguments)
    return costs


def test_between_swept_rows_lines_are_straight():
    costs = swept()
    for rows in (1, 2, 3, 5, 8, 12, 31, 40):
        assert costs.verify(rows, 100) == pytest.approx(0.04 + 0.002 * rows)


def test_the_sweep_takes_the_least_and_never_less_for_more_rows():
    passes = iter([9.0, *(5.0, 3.0, 2.0, 2.5, 4.0, 6.0), *[1.0, 3.5, 2.2, 2.6, 7.0, 8.0] * 2])
    costs = swept(lambda rows: next(passes))
    assert [costs.verify(rows, 0) for rows in (1, 2, 4, 8, 16, 32)] == pytest.approx([1.0, 2.0, 2.0, 2.0, 3.0, 4.0])


def test_the_sweep_keeps_to_its_budget():
    spent = []

    def run(rows):
        spent.append(0.3)
        return 0.3

    swept(run, budget=1.0)
    assert sum(spent) <= 1.0
    spent.clear()
    costs = swept(run, budget=0.5)
    assert len(spent) == 3, "to get ready, and two row counts at least"
    assert costs.verify(8, 0) == pytest.approx(0.3)
    spent.clear()
    costs = swept(run, budget=0.1)
    assert len(spent) == 1 and costs.verify(8, 0) == pytest.approx(0.3)


def test_groups():
    assert [group(count) for count in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [0, 1, 2, 2, 3, 3, 4, 4, 5]


def test_rounds_move_the_estimate_where_they_were():
    """Passes of 9 to 16 rows cost twice what bare ones did, the others do not: the curve has a step."""
    costs, chance = swept(), random.Random(0)
    for _ in range(400):
        rows = chance.choice([1, 4, 7, 12, 15])
        costs.observe(rows, 100, (0.04 + 0.002 * rows) * (2 if rows > 8 else 1))
    step = costs.verify(9, 100) / costs.verify(8, 100)
    assert step == pytest.approx(2 * 0.058 / 0.056, rel=0.2)
    assert costs.verify(14, 100) / costs.verify(10, 100) == pytest.approx(0.068 / 0.06)


def test_a_machine_that_is_slow_for_a_while_changes_no_comparison():
    costs, chance = swept(draft_share=0.1), random.Random(1)
    for number in range(300):
        pace = 3.0 if 100 <= number < 200 else 1.0
        rows = 1 if 120 <= number < 180 else chance.choice([1, 4, 8, 12])
        costs.observe(rows, 100, pace * (0.04 + 0.002 * rows), 2, 6, pace * 0.008)
        if number > 250 or 180 < number < 200:
            assert costs.verify(8, 100) / costs.verify(1, 100) == pytest.approx(0.056 / 0.042, rel=0.2)
            assert costs.draft(2, 100, 6) / costs.verify(1, 100) == pytest.approx(0.008 / 0.042, rel=0.35)


def test_a_single_slow_round_counts_little():
    curve = Curve({1: 1.0})
    for _ in range(20):
        curve.add(1, 1.0)
    curve.add(1, 50.0)
    assert curve(1) < 1.1


def test_every_range_of_contexts_has_its_own_curve_and_starts_from_its_neighbour():
    costs = swept()
    for _ in range(20):
        costs.observe(1, 100, 0.042)
        costs.observe(8, 100, 0.056)
    assert costs.verify(8, 5000) == pytest.approx(costs.verify(8, 100))
    assert costs.rounds_seen(8, 100) == pytest.approx(sum(FADING**number for number in range(20)))  # the others fade
    assert costs.rounds_seen(8, 5000) == 0
    for _ in range(60):
        costs.observe(8, 5000, 0.056)
        costs.observe(1, 5000, 0.084)
    assert costs.verify(1, 5000) / costs.verify(8, 5000) == pytest.approx(1.5, rel=0.1)
    assert costs.verify(8, 100) / costs.verify(1, 100) == pytest.approx(0.056 / 0.042, rel=0.1)


def test_drafting_is_free_until_it_is_timed_or_guessed():
    assert CostModel().draft(3, 0, 6) == 0
    assert swept(draft_share=0.25).draft(2, 0, 6) == pytest.approx(2 * 0.25 * 0.042)
    costs = swept()
    costs.observe(4, 0, 0.048, steps=2, width=6, draft_seconds=0.02)
    assert costs.draft(3, 0, 6) == pytest.approx(0.03)
    assert costs.draft(0, 0, 6) == 0


def test_rows_that_were_dear_once_are_found_cheaper():
    """Nobody runs eight rows any more, because other work once made them slow: what all rounds have in common counts more
    with every round of other rows."""
    costs = CostModel({1: 0.04, 8: 0.05})
    for _ in range(32):
        costs.observe(1, 100, 0.04)
        costs.observe(8, 100, 0.09)
    dear = costs.verify(8, 100) / costs.verify(1, 100)
    for _ in range(150):
        costs.observe(1, 100, 0.04)
    assert dear > 2 and costs.verify(8, 100) / costs.verify(1, 100) < 1.5


def test_what_contemplation_takes_beside_its_rows_is_no_matter_of_rows():
    """Rounds with it and without, on a machine that turns slow: the curve stays that of rows."""
    costs = swept()
    costs.contemplation = 0.02
    for number in range(60):
        pace, rows, beside = (2.0 if number > 30 else 1.0), (4, 12)[number % 2], (0.0, 0.02)[number // 2 % 2]
        costs.observe(rows, 100, pace * (0.04 + 0.002 * rows + beside), beside=beside)
    assert costs.verify(12, 100) / costs.verify(4, 100) == pytest.approx(0.064 / 0.048, rel=0.05)
    assert CostModel.from_dict(costs.to_dict()).contemplation == 0.02
    assert CostModel.from_dict({**costs.to_dict(), "contemplation": None}).contemplation is None
    with pytest.raises(ValueError, match="Costs: got data that cannot be read .contemplation of -1 seconds"):
        CostModel.from_dict({**costs.to_dict(), "contemplation": -1})


def test_given_costs_are_taken_at_their_word():
    costs = CostModel({1: 0.04, 8: 0.05}, draft_step=0.004, learns=False)
    costs.observe(1, 0, 9.0, 1, 6, 9.0)
    assert costs.verify(1, 0) == pytest.approx(0.04)
    assert costs.draft(2, 0, 6) == pytest.approx(0.008)


@pytest.mark.parametrize("verify, draft_step", [({}, None), ({0: 1.0}, None), ({1: 0.0}, None), ({1: 1.0}, -1.0)])
def test_costs_that_cannot_be_are_refused(verify, draft_step):
    with pytest.raises(ValueError, match="Costs: got verify=.*expected seconds by rows"):
        CostModel(verify, draft_step)


def test_costs_of_the_user():
    confu = ConFuAssistant.from_target(tiny_llama())
    assert confu.costs is None
    confu.costs = CostModel({1: 0.04})
    assert confu.costs.verify(1, 0) == pytest.approx(0.04)
    confu.costs = json.loads(json.dumps(confu.costs.to_dict()))
    assert confu.costs.verify(1, 0) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="got data that cannot be read .*expected CostModel.to_dict()"):
        confu.costs = {"curves": []}


@pytest.fixture
def key(monkeypatch, tmp_path) -> CostKey:
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return CostKey.of(tiny_llama(), None, "packed")


def test_costs_are_kept_on_disk(key):
    assert load_costs(key) is None
    costs = swept(draft_share=0.1)
    for rows in (1, 8, 8, 12):
        costs.observe(rows, 700, 0.05, 2, 6, 0.01)
    save_costs(key, costs)
    loaded = load_costs(key)
    assert loaded.to_dict() == costs.to_dict()
    assert loaded.verify(10, 700) == pytest.approx(costs.verify(10, 700))
    assert loaded.draft(2, 700, 6) == pytest.approx(costs.draft(2, 700, 6))
    assert [path.name for path in cost_folder().iterdir()] == [key.file_name], "no partial file is left"


def test_other_models_and_ways_to_run_them_have_other_files(key):
    others = [
        CostKey.of(tiny_llama(), None, "compiled"),
        CostKey.of(tiny_llama(num_hidden_layers=2), None, "packed"),
        CostKey.of(tiny_llama(), tiny_llama(), "packed"),
    ]
    assert len({key.file_name, *(other.file_name for other in others)}) == 4
    assert CostKey.of(tiny_llama(seed=5), None, "packed") == key, "weights do not matter"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', "null", "\x00\xff"])
def test_a_damaged_file_is_measured_anew(key, damage):
    save_costs(key, swept())
    (cost_folder() / key.file_name).write_text(damage, encoding="latin-1")
    assert load_costs(key) is None
    save_costs(key, swept())
    assert load_costs(key) is not None


def test_numbers_that_cannot_be_are_not_read(key):
    save_costs(key, swept())
    path = cost_folder() / key.file_name
    for old, new in (('"1": ', '"1": -'), ('"range": 0', '"range": "x"'), ('"kind": "verify"', '"kind": "other"')):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert load_costs(key) is None
        path.write_text(text)
    assert load_costs(key) is not None


def test_the_switch_and_a_folder_that_cannot_be_written(key, monkeypatch, tmp_path):
    (tmp_path / "confu_hf").write_text("a file where the folder should be")
    save_costs(key, swept())
    assert load_costs(key) is None
    monkeypatch.setenv(SWITCH, "1")
    assert cost_folder() is None and load_costs(key) is None
    save_costs(key, swept())
