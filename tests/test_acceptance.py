"""Acceptance: the text is that of plain decoding, seed by seed and in distribution, whatever was drafted."""

import random
from functools import partial

import pytest
import torch
from scipy.stats import chisquare
from table_target import (
    PROMPT,
    VOCAB,
    Target,
    full_tree,
    make_tree,
    plain_decoding,
    processor_list,
    random_tree,
    run,
    tree_decoding,
)
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from confu_hf.decoding.acceptance import Sampler, _children, accept, greedy_choices, walk_greedily, walk_stepwise
from confu_hf.tree.draft_tree import DraftTree


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "temperature", "warpers", "repetition"])
def test_seed_by_seed_the_text_is_that_of_plain_decoding(name, dtype, do_sample):
    target, processors = Target(dtype=dtype), processor_list(name)
    for seed in range(5):
        torch.manual_seed(seed)
        expected, _, _ = plain_decoding(target, 20, processors, do_sample)
        stream_after = torch.get_rng_state()
        rng = random.Random(seed)
        for draw_tree in (partial(random_tree, rng=rng), partial(full_tree, depth=2), partial(make_tree, drafted=[])):
            torch.manual_seed(seed)
            ids, *_ = tree_decoding(target, 20, processors, do_sample, draw_tree)
            assert ids == expected
            assert torch.equal(torch.get_rng_state(), stream_after)  # not one number more than plain decoding drew


def test_a_full_tree_accepts_all_of_its_depth():
    target = Target()
    torch.manual_seed(0)
    *_, rounds = tree_decoding(target, 20, LogitsProcessorList(), True, lambda root: full_tree(root, 3))
    assert rounds == 5  # 3 accepted and 1 bonus token a round
    *_, rounds = tree_decoding(target, 20, LogitsProcessorList(), True, lambda root: make_tree(root, []))
    assert rounds == 20


def test_the_greedy_fast_path_equals_the_reference():
    rng = random.Random(0)
    lengths = set()
    for seed in range(60):
        # Small integers as logits: ties are frequent.
        tree = random_tree(PROMPT[-1], rng, num_nodes=20)
        logits = torch.randint(0, 3, (*tree.tokens.shape, VOCAB), generator=torch.Generator().manual_seed(seed))
        limit = MaxLengthCriteria(len(PROMPT) + rng.randrange(1, 4))
        for criteria in (StoppingCriteriaList(), StoppingCriteriaList([limit])):
            ids, children = torch.tensor([PROMPT]), _children(tree.tokens[0].tolist(), tree.parents[0].tolist())
            fast = walk_greedily(children, greedy_choices(logits.float())[0].tolist(), ids, criteria)
            rules = (LogitsProcessorList(), Sampler(do_sample=False), criteria)
            slow = walk_stepwise(children, logits.float(), ids, *rules)
            assert (fast.path, fast.tokens, fast.finished) == (slow.path, slow.tokens, slow.finished)
            lengths.add((len(fast.path), fast.finished))
    assert {(1, False), (2, False), (3, False), (1, True), (2, True)} <= lengths


def test_float64_ties_are_broken_as_in_plain_decoding():
    # Equal in float32, where plain decoding compares them: the first one wins.
    logits = torch.tensor([[[1.0, 1.0 + 1e-12, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    assert greedy_choices(logits).tolist() == [[0]]
    assert run(make_tree(4, []), logits).tokens.tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_processors_get_a_float32_copy(dtype):
    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert scores.dtype == torch.float32
            return scores.add_(1.0)

    tree = full_tree(PROMPT[-1], 1)
    logits = Target(dtype=dtype).verify(tree, PROMPT)
    before = logits.clone()
    run(tree, logits, processors=LogitsProcessorList([InPlace()]))
    assert torch.equal(logits, before)


# Drafted for the chi-square tests, as (parent, token):
DRAFTED = [(0, 1), (0, 4), (1, 0), (1, 2)]  # two of the root's children, and two of the first one's
NUM_DRAWS = 20_000


def exact_distribution(target, processors):
    """Probability of every outcome: the emitted tokens, one more than the depth at which the walk leaves the tree."""
    children = {(parent, token): node + 1 for node, (parent, token) in enumerate(DRAFTED)}

    def outcomes(node, ids):
        scores = processors(torch.tensor([ids]), target.logits(ids)[None].double().clone())
        for token, probability in enumerate(scores.softmax(-1)[0].tolist()):
            child = children.get((node, token))
            tails = [((), 1.0)] if child is None else outcomes(child, [*ids, token])
            for tail, tail_probability in tails:
                yield (token, *tail), probability * tail_probability

    return {tokens: probability for tokens, probability in outcomes(0, PROMPT) if probability > 0}


def p_value(draws, distribution):
    assert set(draws) <= set(distribution)  # an impossible outcome
    expected = [NUM_DRAWS * probability for probability in distribution.values()]
    assert min(expected) > 5  # the chi-square approximation holds
    return chisquare([draws.count(tokens) for tokens in distribution], expected).pvalue


@pytest.fixture(scope="module")
def draws():
    target, processors = Target(), LogitsProcessorList([TemperatureLogitsWarper(2.5)])
    tree = make_tree(PROMPT[-1], DRAFTED)
    logits, ids = target.verify(tree, PROMPT), torch.tensor([PROMPT])
    options = {"processors": processors, "do_sample": True, "stopping_criteria": StoppingCriteriaList()}
    torch.manual_seed(0)
    outcomes = []
    for _ in range(NUM_DRAWS):
        outcomes.append(tuple(accept(tree, logits, ids, **options).tokens[0].tolist()))
    return outcomes, exact_distribution(target, processors)


def test_sampled_outcomes_follow_the_target(draws):
    outcomes, distribution = draws
    assert sum(distribution.values()) == pytest.approx(1.0)
    assert p_value(outcomes, distribution) > 1e-3


def test_drawing_twice_is_caught(draws):
    # Wrong rule: if the first draw leaves the tree at its root, draw once more.
    outcomes, distribution = draws
    again = outcomes[1:] + outcomes[:1]
    wrong = [second if len(first) == 1 else first for first, second in zip(outcomes, again, strict=True)]
    assert p_value(wrong, distribution) < 1e-6


def test_accepting_the_likeliest_child_is_caught(draws):
    # Wrong rule, applied to one draw in five: whatever would leave the tree at its root becomes a child.
    outcomes, distribution = draws
    children = [tokens for tokens in distribution if len(tokens) > 1]
    likeliest = max(children, key=distribution.get)
    wrong = [likeliest if len(tokens) == 1 and i % 5 == 0 else tokens for i, tokens in enumerate(outcomes)]
    assert p_value(wrong, distribution) < 1e-6


class Witness(LogitsProcessor):
    """Remembers the ids and scores it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids[0].tolist(), scores[0].tolist()))
        return scores


class StopAt(StoppingCriteria):
    """Stops at a token, and remembers what it was called with."""

    def __init__(self, token=None):
        self.token, self.calls = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids[0].tolist(), scores))
        return input_ids[:, -1] == (-1 if self.token is None else self.token)


def chain_target(tokens):
    """Logits of a chain tree, whose every node wants the next of `tokens`."""
    logits = torch.zeros(1, len(tokens), VOCAB)
    logits[0, torch.arange(len(tokens)), torch.tensor(tokens)] = 10.0
    return logits


def accept_chain(drafted, wanted, **options):
    """Greedy acceptance of a chain of `drafted` tokens by a target that wants `wanted` (one more)."""
    tree = make_tree(PROMPT[-1], list(enumerate(drafted)))
    return run(tree, chain_target(wanted), **options)


def test_processors_see_the_ids_up_to_the_node_and_its_logits():
    witness = Witness()
    acceptance = accept_chain([2, 0, 3], [2, 0, 1, 4], processors=LogitsProcessorList([witness]))
    assert acceptance.path.tolist() == [[0, 1, 2]] and acceptance.tokens.tolist() == [[2, 0, 1]]
    assert [ids for ids, _ in witness.calls] == [PROMPT, [*PROMPT, 2], [*PROMPT, 2, 0]]
    assert [scores.index(10.0) for _, scores in witness.calls] == [2, 0, 1]


@pytest.mark.parametrize("processors", [LogitsProcessorList(), LogitsProcessorList([Witness()])])
@pytest.mark.parametrize(
    "stop_token, path, tokens, finished",
    [
        (2, [0], [2], True),  # at the first of them
        (0, [0, 1], [2, 0], True),  # in the middle of the path
        (1, [0, 1, 2], [2, 0, 1], True),  # at the bonus token
        (4, [0, 1, 2], [2, 0, 1], False),  # node 3 was rejected: its token is never written
        (None, [0, 1, 2], [2, 0, 1], False),
    ],
)
def test_stopping_in_the_middle_of_a_path(processors, stop_token, path, tokens, finished):
    criterion = StopAt(stop_token)
    acceptance = accept_chain(
        [2, 0, 3], [2, 0, 1, 4], processors=processors, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert acceptance.path.tolist() == [path] and acceptance.tokens.tolist() == [tokens]
    assert acceptance.finished == (finished,) and acceptance.counts == (len(tokens),)
    assert criterion.calls == [(PROMPT + tokens[: i + 1], None) for i in range(len(tokens))]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["none", "repetition"])
def test_recorded_scores_and_logits_are_those_of_plain_decoding(name, do_sample):
    target, processors = Target(), processor_list(name)
    torch.manual_seed(3)
    expected = plain_decoding(target, 12, processors, do_sample)
    torch.manual_seed(3)
    criteria = StoppingCriteriaList([MaxLengthCriteria(len(PROMPT) + 12)])
    ids, scores, raw_logits, _ = tree_decoding(
        target, 12, processors, do_sample, lambda root: full_tree(root, 2), record=True, stopping_criteria=criteria
    )
    assert ids == expected[0] and len(scores) == len(raw_logits) == 12
    for got, plain in zip(scores + raw_logits, expected[1] + expected[2], strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, plain)


def test_criteria_see_the_scores_of_all_rounds():
    criterion = StopAt()
    criteria = StoppingCriteriaList([criterion, MaxLengthCriteria(len(PROMPT) + 7)])
    _, scores, _, _ = tree_decoding(
        Target(),
        7,
        LogitsProcessorList(),
        False,
        lambda root: full_tree(root, 1),
        record=True,
        stopping_criteria=criteria,
    )
    assert [len(seen) for _, seen in criterion.calls] == [1, 2, 3, 4, 5, 6, 7]
    assert all(a is b for a, b in zip(criterion.calls[-1][1], scores, strict=True))
    accept_chain([], [1], record=True, past_scores=None, stopping_criteria=StoppingCriteriaList([criterion]))
    assert criterion.calls[-1][1] is None  # raw logits were asked for, scores were not


def test_nothing_is_recorded_unasked():
    acceptance = accept_chain([2], [2, 1], processors=LogitsProcessorList([Witness()]))
    assert acceptance.scores == ((),) and acceptance.raw_logits == ((),)


def test_a_token_drafted_twice_takes_the_earlier_node():
    tree = make_tree(0, [(0, 2), (0, 2)])
    logits = chain_target([2, 1, 3])
    acceptance = run(tree, logits)
    assert acceptance.path.tolist() == [[0, 1]] and acceptance.tokens.tolist() == [[2, 1]]


def test_rows_of_a_batch_walk_alone():
    """Rows of different length, trees and ends; the third one had ended before."""
    target = Target()
    prompts = [PROMPT, [*PROMPT, 2, 1], PROMPT, [*PROMPT, 3]]
    trees = [full_tree(ids[-1], 2) for ids in prompts]
    batch = DraftTree(*(torch.cat([getattr(tree, name) for tree in trees]) for name in DraftTree.__dataclass_fields__))
    logits = torch.cat([target.verify(tree, ids) for tree, ids in zip(trees, prompts, strict=True)])
    ids = torch.full((4, len(PROMPT) + 2), -1)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    options = {
        "processors": processor_list("repetition"),
        "stopping_criteria": StoppingCriteriaList([StopAt(1)]),
        "do_sample": False,
    }
    lengths, finished = [len(prompt) for prompt in prompts], [False, False, True, False]
    together = accept(batch, logits, ids, lengths=lengths, finished=finished, **options)
    assert together.counts[2] == 0 and together.finished[2] and (together.path[2] == -1).all()
    for row in (0, 1, 3):
        alone = accept(trees[row], logits[row : row + 1], torch.tensor([prompts[row]]), **options)
        count = together.counts[row]
        assert (count,) == alone.counts and (together.finished[row],) == alone.finished
        assert together.path[row, :count].tolist() == alone.path[0].tolist()
        assert together.tokens[row, :count].tolist() == alone.tokens[0].tolist()
        assert (together.tokens[row, count:] == -1).all() and (together.path[row, count:] == -1).all()


def test_shapes_that_do_not_fit_are_refused():
    tree = make_tree(0, [(0, 1)])
    with pytest.raises(
        ValueError, match=r"got trees of shape \(1, 2\), logits \(1, 3, 5\).*expected one row of logits"
    ):
        accept(
            tree,
            torch.zeros(1, 3, 5),
            torch.tensor([PROMPT]),
            processors=LogitsProcessorList(),
            stopping_criteria=StoppingCriteriaList(),
            do_sample=False,
        )
