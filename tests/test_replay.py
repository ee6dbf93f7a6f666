"""A replay of a greedy text goes through the rounds that wrote it, tree by tree."""

from __future__ import annotations

import pytest
import torch
from oracles import OracleDrafter, make_assistant
from tiny_models import ARCHITECTURES, keep_softmax_in_float64
from transformers import DynamicCache

from confu_hf import ConFuAssistant
from confu_hf.compat import cache_keyword
from confu_hf.options import TreeOptions
from confu_hf.target.context import KnownTexts

PROMPTS = [[5, 17, 40, 8], [9, 3, 30, 30, 61, 7, 12], [44, 45]]
LIMIT, DEPTH = 22, 3
TREE = {"total_tokens": 9, "depth": DEPTH, "top_k": 3, "lookup": False, "policy": "fixed"}


class Recorded(ConFuAssistant):
    """Keeps the trees of a call. With `oracle` it drafts what the target says, now and then: an untrained draft would
    have every round bring one token."""

    oracle = False

    def new_drafter(self, target, options):
        drafter = OracleDrafter(self, target) if self.oracle else super().new_drafter(target, options)
        grow, self.trees = drafter.grow, []
        drafter.grow = lambda state, plan: self.trees.append(grow(state, plan)) or self.trees[-1]
        return drafter


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def written(target, confu, prompt, **options):
    """A greedy answer, tokens by round, and the trees."""
    options = {"draft_top_k" if name == "top_k" else name: value for name, value in {**TREE, **options}.items()}
    prompt = torch.tensor([prompt])
    rules = {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": None}
    ids = target.generate(prompt, assistant_model=confu, **rules, **options)
    return ids[0].tolist(), [record.accepted[0] for record in confu.stats.records], confu.trees


def known(target, layer_ids, texts) -> KnownTexts:
    length = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    cache = DynamicCache()
    with torch.no_grad():
        states = target(ids, **cache_keyword(target, cache), output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in layer_ids], dim=-1)
    prompts = torch.tensor([len(prompt) for prompt in PROMPTS])
    return KnownTexts(ids, features, cache, prompts, torch.tensor([len(text) for text in texts]))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("contemplate_tokens", [None, 2, 0], ids=["all", "two", "eagle3"])
@pytest.mark.parametrize("oracle", [True, False], ids=["oracle", "network"])
@pytest.mark.parametrize("future_words", [0, 1, 2])
def test_the_rounds_are_those_of_generate(architecture, contemplate_tokens, oracle, future_words):
    """In batches of sequences of different lengths, each with rounds of its own."""
    target = ARCHITECTURES[architecture]()
    confu = make_assistant(target, Recorded, future_words=future_words)
    confu.oracle = oracle
    options = {"contemplate": False} if contemplate_tokens == 0 else {"contemplate_tokens": contemplate_tokens}
    answers = [written(target, confu, prompt, **options) for prompt in PROMPTS]
    # Two are cut, as if the text ended there: rows end at different times.
    texts = [ids[: len(ids) - cut] for (ids, _, _), cut in zip(answers, (0, 9, 3), strict=True)]
    counts = confu.replay(TreeOptions(**TREE, **options)).counts(known(target, confu.config.target_layer_ids, texts))
    compared = 0
    for row, (prompt, text, (_, rounds, trees)) in enumerate(zip(PROMPTS, texts, answers, strict=True)):
        assert sum(counts[row]) == len(text) - len(prompt) - 1  # the first token is prefill's
        # Close to the end `generate` draws in its trees, and a text that was cut has another end.
        far = [n for n in range(len(rounds)) if len(prompt) + 1 + sum(rounds[: n + 1]) + DEPTH < len(text)]
        assert counts[row][: len(far)] == rounds[: len(far)]
        for expected, tree in zip(trees[: len(far)], confu.trees, strict=False):
            assert torch.equal(tree.tokens[row], expected.tokens[0])
            torch.testing.assert_close(tree.log_probs[row], expected.log_probs[0], rtol=0, atol=1e-5)
        compared += len(far)
    assert compared > 8
    assert not oracle or max(map(max, counts)) > 1


def test_the_future_matters_to_a_replay():
    """The negative control of the comparison above: other contemplate tokens, other trees."""
    target = ARCHITECTURES["llama"]()
    confu = make_assistant(target, Recorded)
    texts = [written(target, confu, prompt)[0] for prompt in PROMPTS]
    view, seen = known(target, confu.config.target_layer_ids, texts), []
    for _ in range(2):
        confu.replay(TreeOptions(**TREE)).counts(view)
        seen.append([tree.log_probs for tree in confu.trees])
        target.confu.adapter_weights(target.confu.current)["confu_experts"].neg_()
    first, second = seen
    assert torch.equal(first[0], second[0])  # no future yet
    assert (first[1] - second[1]).abs().max() > 1e-3
