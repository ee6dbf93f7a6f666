"""The promise of the project: `generate(assistant_model=confu)` writes what plain `generate` writes, in fewer target
passes.

A random draft is hardly ever right, so most tests draft with an oracle that asks the target itself and is wrong on
purpose now and then: paths get long, and every branch of the loop is walked.
"""

from __future__ import annotations

import pytest
import torch
from assisted_calls import CACHE_NAMES
from oracles import make_assistant, make_oracle
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from confu_hf.decoding import loop

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44, 23, 7, 3]])
LENGTHS = {"max_new_tokens": 32, "pad_token_id": 0}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "options", [{}, {"contemplate_tokens": 2}, {"contemplate": False}], ids=["all", "two", "eagle3"]
)
def test_greedy_is_identical(name, options):
    model = ARCHITECTURES[name]()
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    assistant = make_oracle(model)
    got = model.generate(
        PROMPT,
        do_sample=False,
        assistant_model=assistant,
        total_tokens=12,
        depth=4,
        draft_top_k=3,
        **options,
        **LENGTHS,
    )
    assert got.tolist() == expected.tolist()
    if expected.shape[1] - PROMPT.shape[1] > 8:
        assert assistant.stats.mean_accepted_length > 2.5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_greedy_is_identical_with_the_real_draft(name):
    model = ARCHITECTURES[name]()
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    for soft_prompt_type in ("kv", "embedding"):
        assistant = make_assistant(model, soft_prompt_type=soft_prompt_type)
        got = model.generate(PROMPT, do_sample=False, assistant_model=assistant, **LENGTHS)
        assert got.tolist() == expected.tolist()
        assistant.detach()


def test_a_confidence_threshold_verifies_fewer_nodes_and_changes_no_text():
    model = tiny_llama()
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    assistant = make_assistant(model)
    verified = []
    for threshold in (0.0, 0.02, 0.9):
        got = model.generate(
            PROMPT, do_sample=False, assistant_model=assistant, confidence_threshold=threshold, **LENGTHS
        )
        assert got.tolist() == expected.tolist()
        verified.append(assistant.stats.verified_nodes / assistant.stats.rounds)
    assert verified[0] > verified[1] > verified[2] >= 1


def test_sampling_is_seed_exact():
    model = tiny_llama()
    assistant = make_oracle(model)
    settings = [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 11},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 0.8, "repetition_penalty": 1.3, "top_k": 30, "top_p": 0.9},
    ]
    lengths = {"max_new_tokens": 7, "pad_token_id": 0}
    accepted = []
    for seed in range(200):
        arguments = {"do_sample": True, **settings[seed % len(settings)], **lengths}
        torch.manual_seed(seed)
        expected = model.generate(PROMPT, **arguments)
        after = torch.rand(())
        torch.manual_seed(seed)
        got = model.generate(PROMPT, assistant_model=assistant, total_tokens=8, depth=2, draft_top_k=4, **arguments)
        assert got.tolist() == expected.tolist(), f"seed {seed}, {arguments}"
        assert torch.rand(()) == after, "the global random stream was used differently"
        accepted.append(assistant.stats.new_tokens / (1 + assistant.stats.rounds))
    assert sum(accepted) / len(accepted) > 1.3


def test_a_wrong_place_would_be_noticed(monkeypatch):
    """Negative control: a verify pass whose tree positions are off by one changes the text."""
    model = tiny_llama()
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    layout = loop.verify_layout

    def shifted(*args, root_places, **kwargs):
        return layout(*args, root_places=root_places - 1, **kwargs)

    monkeypatch.setattr(loop, "verify_layout", shifted)
    got = model.generate(PROMPT, do_sample=False, assistant_model=make_oracle(model), **LENGTHS)
    assert got.tolist() != expected.tolist()


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
def test_max_new_tokens_is_exact(new_tokens):
    model = tiny_llama()
    got = model.generate(PROMPT, assistant_model=make_oracle(model), max_new_tokens=new_tokens, do_sample=False)
    assert got.shape[1] == PROMPT.shape[1] + new_tokens


def test_stops_at_the_first_end_token_of_a_block():
    model = tiny_llama()
    free = model.generate(PROMPT, do_sample=False, eos_token_id=-1, **LENGTHS)[0, PROMPT.shape[1] :].tolist()
    assistant = make_oracle(model)
    for end in sorted(set(free), key=free.index)[:10]:
        expected = model.generate(PROMPT, do_sample=False, eos_token_id=end, **LENGTHS)
        got = model.generate(PROMPT, do_sample=False, eos_token_id=end, assistant_model=assistant, **LENGTHS)
        assert got.tolist() == expected.tolist()
        assert assistant.stats.new_tokens == free.index(end) + 1


class _StopAtSum(StoppingCriteria):
    """A custom criterion: the new tokens add up to a multiple of `number`."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, PROMPT.shape[1] :].sum(-1) % self.number == 0


@pytest.mark.parametrize("number", [3, 7, 13])
def test_custom_stopping_criteria_stop_inside_a_block(number):
    model = tiny_llama()
    criteria = StoppingCriteriaList([_StopAtSum(number)])
    expected = model.generate(PROMPT, do_sample=False, stopping_criteria=criteria, **LENGTHS)
    got = model.generate(
        PROMPT, do_sample=False, stopping_criteria=criteria, assistant_model=make_oracle(model), **LENGTHS
    )
    assert got.tolist() == expected.tolist()


@pytest.fixture
def tokenizer():
    """One visible character per token."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
    raw = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_stop_strings(tokenizer):
    model = tiny_llama()
    free = model.generate(PROMPT, do_sample=False, **LENGTHS)[0, PROMPT.shape[1] :].tolist()
    assistant = make_oracle(model)
    for start in range(1, 9, 2):
        stop = tokenizer.decode(free[start : start + 2])  # two tokens: they may lie in two blocks
        arguments = {"do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer, **LENGTHS}
        expected = model.generate(PROMPT, **arguments)
        got = model.generate(PROMPT, assistant_model=assistant, **arguments)
        assert got.tolist() == expected.tolist()
        assert expected.shape[1] < PROMPT.shape[1] + len(free)


def test_streamers_get_every_token_once_and_in_order(tokenizer, capsys):
    model = tiny_llama()
    expected = tokenizer.decode(model.generate(PROMPT, do_sample=False, **LENGTHS)[0, PROMPT.shape[1] :])
    assistant = make_oracle(model)
    model.generate(
        PROMPT,
        do_sample=False,
        assistant_model=assistant,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **LENGTHS,
    )
    assert capsys.readouterr().out.removesuffix("\n") == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    model.generate(PROMPT, do_sample=False, assistant_model=assistant, streamer=streamer, **LENGTHS)
    assert "".join(streamer) == expected


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits_are_those_of_plain_decoding(do_sample):
    model = tiny_llama()
    arguments = {
        "do_sample": do_sample,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **LENGTHS,
    }
    assistant = make_oracle(model)
    torch.manual_seed(3)
    expected = model.generate(PROMPT, **arguments)
    torch.manual_seed(3)
    got = model.generate(PROMPT, assistant_model=assistant, **arguments)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for ours, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("cache_name", CACHE_NAMES)
@pytest.mark.parametrize("passed_in", [False, True])
def test_a_second_turn_on_the_returned_cache_equals_a_fresh_run(name, passed_in, cache_name):
    model = ARCHITECTURES[name]()
    assistant = make_oracle(model)
    arguments = {"do_sample": False, "assistant_model": assistant, "return_dict_in_generate": True, **LENGTHS}
    cache = {cache_name: DynamicCache(config=model.config)} if passed_in else {}
    first = model.generate(PROMPT, **cache, **arguments)
    if passed_in:
        assert getattr(first, cache_name) is cache[cache_name]
    assert getattr(first, cache_name).get_seq_length() == first.sequences.shape[1] - 1
    second_prompt = torch.cat([first.sequences, torch.tensor([[9, 31, 4]])], dim=1)
    fresh = model.generate(second_prompt, do_sample=False, **LENGTHS)
    second = model.generate(second_prompt, **{cache_name: getattr(first, cache_name)}, **arguments)
    assert second.sequences.tolist() == fresh.tolist()
    third_prompt = torch.cat([second.sequences, torch.tensor([[2 + 40, 6]])], dim=1)
    plain = model.generate(third_prompt, **{cache_name: getattr(second, cache_name)}, do_sample=False, **LENGTHS)
    assert plain.tolist() == model.generate(third_prompt, do_sample=False, **LENGTHS).tolist()


MASKS = {
    "right": [1] * 9 + [0] * 2,
    "right, long": [1] * 4 + [0] * 7,
    "both": [0, 0] + [1] * 7 + [0, 0],
    "inside": [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    "inside and right": [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0],
    "nothing": [0] * 11,
}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_tokens_count_as_in_plain_generate(name, mask):
    """Plain decoding sets a masked token's position to 0 and counts on from the last token, masked or not."""
    model, mask = ARCHITECTURES[name](), torch.tensor([mask])
    expected = model.generate(PROMPT, attention_mask=mask, do_sample=False, **LENGTHS)
    got = model.generate(PROMPT, attention_mask=mask, do_sample=False, assistant_model=make_oracle(model), **LENGTHS)
    assert got.tolist() == expected.tolist()


def test_left_padding():
    model = tiny_llama()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(PROMPT)], dim=1)
    expected = model.generate(padded, attention_mask=mask, do_sample=False, **LENGTHS)
    assistant = make_oracle(model)
    got = model.generate(padded, attention_mask=mask, do_sample=False, assistant_model=assistant, **LENGTHS)
    assert got.tolist() == expected.tolist()
    assert assistant.stats.mean_accepted_length > 2


def test_stats_count_what_happened():
    model = tiny_llama()
    assistant = make_oracle(model)
    model.generate(
        PROMPT,
        do_sample=False,
        assistant_model=assistant,
        total_tokens=6,
        depth=3,
        draft_top_k=2,
        contemplate_tokens=2,
        eos_token_id=-1,
        **LENGTHS,
    )
    stats = assistant.stats
    assert stats.new_tokens == 32
    # The first token comes out of prefill, the others out of rounds.
    assert stats.mean_accepted_length == pytest.approx((stats.new_tokens - 1) / stats.rounds)
    assert stats.mean_accepted_length == pytest.approx(1 + sum(stats.acceptance_by_depth))
    assert list(stats.acceptance_by_depth) == sorted(stats.acceptance_by_depth, reverse=True)
    assert stats.rounds < stats.verified_nodes <= 7 * stats.rounds
    assert 0 < stats.contemplate_tokens <= 2 * stats.rounds
    assert min(stats.seconds_draft, stats.seconds_verify, stats.seconds_rest) > 0
    with pytest.raises(AttributeError):
        stats.rounds = 0


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("contemplate", [True, False])
def test_targets_of_few_layers(layers, contemplate):
    """Fewer than three features; layers are read as early, in the middle and as late as they can be."""
    model = tiny_llama(num_hidden_layers=layers)
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    assistant = make_oracle(model, contemplate=contemplate)
    assert len(assistant.config.target_layer_ids) == min(layers, 3)
    got = model.generate(PROMPT, do_sample=False, assistant_model=assistant, **LENGTHS)
    assert got.tolist() == expected.tolist()


# Not the ones with sliding windows: plain decoding drops what is out of the window, we mask it, and sums differ in order.
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "granite"])
def test_a_round_of_the_root_alone_is_a_step_of_plain_decoding(name):
    """Without contemplate tokens it needs no mask, and what the target says is bit for bit what it says itself."""
    model = ARCHITECTURES[name](dtype=torch.float32)
    assistant = make_assistant(model, contemplate=False)
    arguments = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **LENGTHS}
    expected = model.generate(PROMPT, **arguments)
    got = model.generate(PROMPT, assistant_model=assistant, total_tokens=0, pack_weights=False, **arguments)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got.logits, expected.logits, strict=True))


def test_no_drafted_tokens_is_plain_decoding():
    model = tiny_llama()
    assistant = make_assistant(model)
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    got = model.generate(PROMPT, do_sample=False, assistant_model=assistant, total_tokens=0, **LENGTHS)
    assert got.tolist() == expected.tolist()
    assert assistant.stats.mean_accepted_length == 1.0
    assert assistant.stats.contemplate_tokens == 0
