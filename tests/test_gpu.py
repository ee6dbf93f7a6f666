"""On a GPU: the texts are those of plain decoding there, losses those of the CPU, and the host waits as seldom as it says.

Skipped where there is none.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import make_assistant, make_oracle
from tiny_models import ARCHITECTURES, keep_softmax_in_float64, tiny_llama
from tiny_pairs import conversations, tiny_pair

from confu_hf import ConFuAssistant, LookupAssistant
from confu_hf.acceleration.attention import folded_attention
from confu_hf.decoding.stats import PHASES, Stopwatch
from confu_hf.options import TreeOptions
from confu_hf.training.data import ConversationCollator
from confu_hf.training.evaluation import known_texts
from confu_hf.training.losses import linear_kl
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.regeneration import Regenerator, Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPT = torch.tensor([[5, 17, 40, 8, 5, 17, 40]])
PROMPTS = torch.tensor([[0, 0, 5, 17, 40], [9, 3, 30, 30, 61], [0, 44, 45, 12, 7]])
LENGTHS = {"max_new_tokens": 40, "eos_token_id": None}
TREE = {"total_tokens": 9, "depth": 3, "draft_top_k": 3}
ON_GPU = ["llama", "qwen3", "mistral", "gemma2", "gemma3"]


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


@pytest.mark.parametrize("architecture", ON_GPU)
@pytest.mark.parametrize("words", [None, 0, 2], ids=["eagle3", "confu", "two words"])
@pytest.mark.parametrize("policy", ["fixed", "auto"])
def test_greedy_texts_are_those_of_plain_decoding(architecture, words, policy):
    target = ARCHITECTURES[architecture]().cuda()
    config = {"contemplate": False} if words is None else {"future_words": words, "lora_rank": 2}
    confu, prompt = make_assistant(target, **config), PROMPT.cuda()
    plain = target.generate(prompt, do_sample=False, **LENGTHS)
    ours = target.generate(prompt, assistant_model=confu, do_sample=False, policy=policy, **TREE, **LENGTHS)
    assert torch.equal(plain, ours) and confu.stats.rounds > 0


@pytest.mark.parametrize("words", [0, 2])
def test_batches_with_padding(words):
    target = tiny_llama().cuda()
    confu = make_assistant(target, future_words=words)
    arguments = {"attention_mask": (PROMPTS > 0).long().cuda(), "pad_token_id": 0, "do_sample": False, **LENGTHS}
    plain = target.generate(PROMPTS.cuda(), **arguments)
    assert torch.equal(plain, target.generate(PROMPTS.cuda(), assistant_model=confu, **TREE, **arguments))


@pytest.mark.parametrize("words", [0, 1])
def test_sampled_texts_are_those_of_plain_decoding(words):
    target, texts = tiny_llama().cuda(), []
    confu, prompt = make_assistant(target, future_words=words), PROMPT.cuda()
    for arguments in ({}, {"assistant_model": confu, **TREE}):
        torch.manual_seed(5)
        texts.append(target.generate(prompt, do_sample=True, temperature=0.8, top_k=0, **LENGTHS, **arguments))
    assert torch.equal(*texts)


def test_a_draft_that_is_right_is_accepted():
    target, prompt = tiny_llama().cuda(), PROMPT.cuda()
    oracle = make_oracle(target)
    plain = target.generate(prompt, do_sample=False, **LENGTHS)
    assert torch.equal(plain, target.generate(prompt, assistant_model=oracle, do_sample=False, **LENGTHS))
    assert oracle.stats.mean_accepted_length > 2


def test_lookup():
    target, prompt = tiny_llama().cuda(), PROMPT.repeat(1, 3).cuda()
    lookup = LookupAssistant(target=target)
    plain = target.generate(prompt, do_sample=False, **LENGTHS)
    assert torch.equal(plain, target.generate(prompt, assistant_model=lookup, do_sample=False, **LENGTHS))


def test_a_second_turn_goes_on_from_the_cache():
    target, prompt = tiny_llama().cuda(), PROMPT.cuda()
    confu = make_assistant(target, future_words=1)
    first = target.generate(
        prompt, assistant_model=confu, do_sample=False, return_dict_in_generate=True, **TREE, **LENGTHS
    )
    longer = torch.cat([first.sequences, PROMPT.cuda()], dim=1)
    cache = getattr(first, "past_key_values", None)
    plain = target.generate(longer, do_sample=False, **LENGTHS)
    again = target.generate(longer, assistant_model=confu, past_key_values=cache, do_sample=False, **TREE, **LENGTHS)
    assert torch.equal(plain, getattr(again, "sequences", again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_run_and_a_pair_comes_from_its_folder(dtype, tmp_path):
    target = tiny_llama(dtype=dtype).cuda()
    tiny_pair(target, future_words=2, lora_rank=2).save_pretrained(tmp_path)
    target = tiny_llama(dtype=dtype).cuda()
    confu = ConFuAssistant.from_pretrained(tmp_path, target=target)
    assert confu.device == target.device
    ours = target.generate(PROMPT.cuda(), assistant_model=confu, do_sample=False, **TREE, **LENGTHS)
    assert ours.shape == (1, PROMPT.shape[1] + 40) and confu.stats.contemplate_tokens > 0


@pytest.mark.parametrize("adapter_alone", [False, True])
@pytest.mark.parametrize("deep_rows", ["all", "survivors"])
def test_losses_and_gradients_are_those_of_the_cpu(adapter_alone, deep_rows):
    batch, found = ConversationCollator(0)(conversations((4, 20), (6, 16))), []
    for device in ("cpu", "cuda"):
        target = tiny_llama()
        draft = tiny_pair(target, future_words=2, lora_rank=2)
        objective = ConFuTrainingObjective(
            max_lag=1, num_anchors=100, future_weight=0.3, adapter_alone=adapter_alone, deep_rows=deep_rows
        )
        module = ConFuForTraining(target, draft, objective).to(device)
        outputs = module(**{name: states.to(device) for name, states in batch.items()})
        outputs["loss"].backward()
        gradients = {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}
        found.append((outputs["loss"].detach().cpu(), outputs["correct"].cpu(), gradients))
    (loss, correct, gradients), (other_loss, other_correct, other_gradients) = found
    # Gates of expert mixtures are softmaxes in float32, whose last bits differ.
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(correct, other_correct) and gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_answers_are_those_of_plain_decoding():
    target = tiny_llama().cuda()
    requests = [Request(tuple(range(3, 5 + number)), 0.0, number) for number in range(1, 9)]
    answers = {answer.index: answer for answer in Regenerator(target, 3, 12).answers(requests)}
    for index, request in enumerate(requests):
        plain = target.generate(torch.tensor([request.tokens]).cuda(), max_new_tokens=12, do_sample=False)
        expected = plain[0, len(request.tokens) :].tolist()
        ended = expected[-1] == 2
        assert (answers[index].tokens, answers[index].finished) == (expected[:-1] if ended else expected, ended)


def test_replays_count_as_on_the_cpu():
    batch, counts = ConversationCollator(0)(conversations((4, 20), (6, 16))), []
    for device in ("cpu", "cuda"):
        target = tiny_llama()
        confu = tiny_pair(target, future_words=2)
        module = ConFuForTraining(target, confu).to(device)
        texts = known_texts(module, {name: states.to(device) for name, states in batch.items()})
        counts.append(confu.replay(TreeOptions(total_tokens=9, depth=3, top_k=3)).counts(texts))
    assert counts[0] == counts[1]


def test_fused_kernels_agree_with_float64():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 9, 5, 64, generator=generator)
    key, value = torch.randn(2, 2, 3, 37, 64, generator=generator)
    mask = torch.rand(2, 1, 5, 37, generator=generator) < 0.7
    mask[..., -1] = True
    exact = folded_attention(*(states.double() for states in (query, key, value)), mask)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        states = (part.to("cuda", dtype) for part in (query, key, value))
        got = folded_attention(*states, mask.cuda()).double().cpu()
        assert (got - exact).norm() / exact.norm() < tolerance
    rows, width, tokens = 300, 64, 500
    hidden, head = torch.randn(rows, width, generator=generator), torch.randn(tokens, width, generator=generator)
    log_probs = torch.randn(rows, tokens, generator=generator).double().log_softmax(-1)
    choice, places, weights = log_probs.argmax(-1), torch.arange(rows), torch.ones(rows)
    exact = linear_kl(hidden.double(), head.double(), log_probs, choice, places, weights.double())[0]
    got = linear_kl(
        *(part.float().cuda() for part in (hidden, head, log_probs)), choice.cuda(), places.cuda(), weights.cuda()
    )[0]
    assert abs(got.item() / exact.item() - 1) < 1e-3


@pytest.mark.parametrize(("options", "most"), [({"policy": "fixed"}, 1), ({"policy": "auto"}, 2)])
@pytest.mark.parametrize("words", [None, 2], ids=["eagle3", "two words"])
def test_a_greedy_round_waits_for_the_gpu_as_seldom_as_host_py_says(options, most, words, monkeypatch):
    """Once for the target's word; with `policy="auto"` once more for the tree. Counted by PyTorch itself, without lookup and
    without the stopwatch, which waits for its own marks once a round is over."""
    target = tiny_llama().cuda()
    config = {"contemplate": False} if words is None else {"future_words": words, "lora_rank": 2}
    confu, prompt = make_assistant(target, **config), PROMPT.cuda()
    arguments = {"assistant_model": confu, "do_sample": False, "lookup": False, **TREE, **options}
    monkeypatch.setattr(Stopwatch, "read", lambda stopwatch: dict.fromkeys(PHASES, 1e-3))  # it waits, to report
    target.generate(prompt, max_new_tokens=8, eos_token_id=None, **arguments)  # costs are measured, kernels loaded
    waits = []
    for tokens in (20, 60):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                target.generate(prompt, max_new_tokens=tokens, eos_token_id=None, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        waits.append((len(found), confu.stats.rounds, found))
    (few, few_rounds, _), (many, rounds, places) = waits
    per_round = (many - few) / (rounds - few_rounds)
    assert per_round <= most + 0.1, (per_round, sorted(set(places)))
