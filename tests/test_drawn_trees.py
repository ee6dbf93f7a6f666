"""Trees that are drawn: whatever the draft says, what is emitted has the target's distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from assisted_calls import PROMPT
from oracles import make_assistant
from scipy.stats import chisquare
from tiny_models import tiny_llama
from transformers import LogitsProcessorList, StoppingCriteriaList, TopKLogitsWarper

from confu_hf import LookupAssistant
from confu_hf.decoding import rejection
from confu_hf.decoding.acceptance import accept
from confu_hf.tree.drawing import draw_tree, tree_shape

VOCAB, DRAFT_IDS = 5, torch.tensor([0, 1, 3, 4])
DRAWS = 3000
# A p-value below this is a failure: about one in ten thousand seeds would give one by chance, and the seeds are fixed.
LEAST = 1e-4


def table(seed: int, tokens: int) -> torch.Tensor:
    """Logits after each of the five tokens."""
    return torch.randn(VOCAB, tokens, generator=torch.Generator().manual_seed(seed)) * 0.8


TARGET, DRAFT = table(1, VOCAB), table(2, len(DRAFT_IDS))


def fit(outcomes, exact):
    """p-value of a chi-square test of outcomes under their exact probabilities."""
    outcomes = [tuple(outcome) for outcome in outcomes]
    assert set(outcomes) <= set(exact) and min(exact.values()) * len(outcomes) > 5
    counts, total = [outcomes.count(key) for key in exact], sum(exact.values())
    return chisquare(counts, [len(outcomes) * value / total for value in exact.values()]).pvalue


def draw(total_tokens=6, temperature=1.3, rows=1, depth=2, most_children=3):
    """Trees over the root token 2, by a draft that knows the last token alone."""
    root = torch.full((rows,), 2)
    sizes = {"total_tokens": total_tokens, "depth": depth, "most_children": most_children}
    return draw_tree(lambda tokens, parents: DRAFT[tokens], root, DRAFT_IDS, temperature=temperature, **sizes)


@pytest.mark.parametrize(
    ("arguments", "parents", "depths"),
    [
        ((5, 3, 8), [0, 0, 0, 1, 4], [1, 1, 1, 2, 3]),
        ((3, 1, 8), [0, 0, 0], [1, 1, 1]),
        ((4, 3, 1), [0, 1, 2], [1, 2, 3]),  # a chain has no more
        ((0, 3, 8), [], []),
        ((5, 0, 8), [], []),
    ],
)
def test_shapes(arguments, parents, depths):
    assert tree_shape(*arguments) == (parents, depths)


def test_a_tree_is_sound():
    tree = draw(total_tokens=9, rows=3)
    assert tree.tokens.shape == (3, 10) and tree.tokens[:, 0].tolist() == [2, 2, 2]
    assert (tree.parents[:, 1:] < torch.arange(1, 10)).all() and set(tree.expanded) == set(
        tree.parents[0, 1:].tolist()
    )
    spread = (DRAFT / 1.3).log_softmax(-1)
    for row, node in itertools.product(range(3), range(1, 10)):
        parent = int(tree.parents[row, node])
        said = spread[tree.tokens[row, parent], DRAFT_IDS.tolist().index(int(tree.tokens[row, node]))]
        assert math.isclose(tree.log_probs[row, node], tree.log_probs[row, parent] + said, abs_tol=1e-5)
        siblings = tree.tokens[row][tree.parents[row] == parent]
        assert len(siblings) == len(siblings.unique())
    for place, node in enumerate(tree.expanded):
        assert torch.equal(tree.distributions[0, place], spread[tree.tokens[0, node]])


def test_children_are_drawn_without_replacement():
    torch.manual_seed(0)
    drawn = draw(total_tokens=2, depth=1, rows=DRAWS).tokens[:, 1:].tolist()
    first = dict(zip(DRAFT_IDS.tolist(), (DRAFT[2] / 1.3).softmax(-1).tolist(), strict=True))
    exact = {(a, b): first[a] * first[b] / (1 - first[a]) for a, b in itertools.permutations(first, 2)}
    assert fit(drawn, exact) > LEAST


def two_tokens(processors=None, **shape):
    """Two tokens from each of many rounds with one drawn tree; what a round leaves out, the target draws."""
    tree = draw(rows=DRAWS, **shape)
    acceptance = accept(
        tree,
        TARGET[tree.tokens],
        tree.tokens[:, :1],
        processors=processors or LogitsProcessorList(),
        do_sample=True,
        stopping_criteria=StoppingCriteriaList(),
    )
    assert len(set(acceptance.counts)) > 1, "some are accepted, some are not"
    first, second = acceptance.tokens[:, 0], acceptance.tokens[:, 1]
    scores = TARGET[first] if processors is None else processors(first[:, None], TARGET[first])
    own = torch.multinomial(scores.softmax(-1), 1)[:, 0]
    return list(zip(first.tolist(), torch.where(second >= 0, second, own).tolist(), strict=True))


def p_value(pairs, processors=None):
    """Of the two tokens, under the target's distribution."""
    scores = TARGET if processors is None else processors(None, TARGET.clone())
    probs = scores.double().softmax(-1)
    exact = {(a, b): float(probs[2, a] * probs[a, b]) for a, b in itertools.product(range(VOCAB), repeat=2)}
    return fit(pairs, {key: value for key, value in exact.items() if value > 0})


@pytest.mark.parametrize("shape", [{}, {"total_tokens": 2}, {"temperature": 0.3}, {"total_tokens": 12, "depth": 3}])
def test_what_is_emitted_follows_the_target(shape):
    torch.manual_seed(1)
    assert p_value(two_tokens(**shape)) > LEAST


def test_processors_are_part_of_the_target():
    torch.manual_seed(2)
    warper = LogitsProcessorList([TopKLogitsWarper(3)])
    assert p_value(two_tokens(warper), warper) > LEAST


class Careless(rejection.RejectionSampler):
    """Forgets what was offered: after a rejection it draws from the target's whole distribution."""

    def __call__(self, scores):
        token = super().__call__(scores)
        is_child = int(token) in self.drawn.get(self.node, ())
        return token if is_child else torch.multinomial(scores[0].softmax(-1), 1)


def test_a_rejection_that_is_forgotten_is_caught(monkeypatch):
    monkeypatch.setattr("confu_hf.decoding.acceptance.RejectionSampler", Careless)
    torch.manual_seed(1)
    assert p_value(two_tokens()) < 1e-9


def test_drawing_with_replacement_is_caught(monkeypatch):
    """The second child weighed as if the first could have come again."""
    monkeypatch.setattr(rejection, "without", lambda spread, token: spread)
    torch.manual_seed(1)
    assert p_value(two_tokens()) < 1e-9


def test_more_is_accepted_than_by_the_same_number_of_best_guesses():
    """One child: the draft's best is right in p(best), a drawn one is accepted in sum min(p, q)."""
    torch.manual_seed(3)
    target = TARGET[2].softmax(-1)
    draft = torch.zeros(VOCAB).index_put((DRAFT_IDS,), DRAFT[2].softmax(-1))
    tree = draw(total_tokens=1, temperature=1.0, rows=DRAWS)
    arguments = {"processors": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList(), "do_sample": True}
    counts = accept(tree, TARGET[tree.tokens], tree.tokens[:, :1], **arguments).counts
    accepted = sum(counts) / DRAWS - 1
    assert abs(accepted - float(torch.minimum(target, draft).sum())) < 0.03
    assert accepted > float(target[draft.argmax()]) + 0.05


def test_generate_follows_the_target():
    """The whole way through `generate`: rows of a batch, the target's two likeliest tokens."""
    model, rows = tiny_llama(num_hidden_layers=3), 250
    assistant = make_assistant(model)
    prompt = PROMPT[:, :5]
    options = {"do_sample": True, "top_k": 2, "temperature": 4.0, "max_new_tokens": 3, "eos_token_id": None}

    def outcomes(ids, probability, left):
        if not left:
            return {tuple(ids[5:]): probability}
        likely = (model(torch.tensor([ids])).logits[0, -1].double() / 4.0).topk(2)
        parts = zip(likely.indices.tolist(), likely.values.softmax(-1).tolist(), strict=True)
        return {
            k: v for token, share in parts for k, v in outcomes([*ids, token], probability * share, left - 1).items()
        }

    torch.manual_seed(4)
    tree = {"draft_sampling": True, "total_tokens": 12, "draft_top_k": 12, "num_return_sequences": rows}
    texts, accepted = [], []
    for _ in range(4):
        texts += model.generate(prompt, assistant_model=assistant, **tree, **options)[:, 5:].tolist()
        accepted.append(assistant.stats.mean_accepted_length)
    assert max(accepted) > 1, "some drafted tokens are accepted"
    assert fit(texts, outcomes(prompt[0].tolist(), 1.0, 3)) > LEAST


def test_greedy_calls_draft_as_ever():
    model = tiny_llama()
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assistant = make_assistant(model)
    got = model.generate(PROMPT, max_new_tokens=12, do_sample=False, assistant_model=assistant, draft_sampling=True)
    assert torch.equal(got, expected)


def test_lookup_has_no_distribution_to_draw_from():
    model = tiny_llama()
    with pytest.raises(
        ValueError, match="draft_sampling: got a LookupAssistant, which looks tokens up, expected a draft"
    ):
        model.generate(PROMPT, assistant_model=LookupAssistant(target=model), draft_sampling=True, do_sample=True)


def test_a_temperature_of_nothing_is_refused():
    with pytest.raises(ValueError, match="draw_tree: got temperature=0, expected above 0"):
        draw(temperature=0)
