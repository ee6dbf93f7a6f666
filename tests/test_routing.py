"""Every way of calling `generate` leads to the decoding loop, with the tree options it was given."""

from __future__ import annotations

from dataclasses import fields
from threading import Thread

import pytest
import torch
from assisted_calls import DRAFT, PROMPT, assisted, plain
from peft import PeftModel
from tiny_models import tiny_llama, tiny_qwen3
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from confu_hf import ConFuAssistant
from confu_hf.adapter.config import ConFuAdapterConfig
from confu_hf.compat import cache_keyword
from confu_hf.decoding.policy import FixedPolicy
from confu_hf.options import TreeOptions


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_greedy_equals_plain_generate(make):
    target = make()
    expected = plain(target)
    assert torch.equal(assisted(target, ConFuAssistant.from_target(target, **DRAFT)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_sampling_is_seed_exact(target, confu, seed):
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    torch.manual_seed(seed)
    expected = plain(target, **options)
    torch.manual_seed(seed)
    assert torch.equal(assisted(target, confu, **options), expected)


def test_peft_model_routes_to_the_loop(folder):
    model = PeftModel.from_pretrained(tiny_llama(), folder, subfolder="adapter")
    confu = ConFuAssistant.from_pretrained(folder, dtype="float64")
    assert torch.equal(assisted(model, confu, policy="fixed"), plain(model))
    assert confu.stats.contemplate_tokens > 0, "without attach(): the adapter that PEFT loaded serves"
    weightless = ConFuAssistant(confu.config).double()
    weightless.attach(model)
    assert torch.equal(assisted(model, weightless), plain(model))
    weightless.detach()
    assert model.get_base_model().confu.current == "default", "what PEFT loaded stays"


@pytest.mark.native_peft
def test_native_adapter_routes_to_the_loop(folder):
    target = tiny_llama()
    target.load_adapter(str(folder / "adapter"))
    confu = ConFuAssistant.from_pretrained(folder, dtype="float64")
    assert torch.equal(assisted(target, confu, policy="fixed"), plain(target))
    assert confu.stats.contemplate_tokens > 0
    target.disable_adapters()
    assert torch.equal(assisted(target, confu, policy="fixed"), plain(target))
    assert confu.stats.contemplate_tokens == 0


def test_pipeline_routes_to_the_loop(target, confu, tokenizer):
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    expected = pipeline("text-generation", model=target, tokenizer=tokenizer)("hello", **arguments)
    confu.stats = None
    routed = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=confu)
    assert routed("hello", **arguments) == expected and confu.stats is not None


def test_other_assistants_pass_through(target, confu):
    small = tiny_llama(num_hidden_layers=2)
    expected = plain(target)
    assert torch.equal(plain(target, assistant_model=small), expected)
    assert torch.equal(plain(target, prompt_lookup_num_tokens=3), expected)
    beams = plain(tiny_llama(), num_beams=2)
    assert torch.equal(plain(target, num_beams=2), beams)
    assert confu.stats is None


def test_stop_strings(target, confu, tokenizer):
    stop = tokenizer.decode(plain(target)[0, PROMPT.shape[1] + 10 :][:2])
    assert len(stop) == 2
    arguments = {"stop_strings": [stop], "tokenizer": tokenizer}
    expected = plain(target, **arguments)
    assert expected.shape[1] < PROMPT.shape[1] + 24
    assert torch.equal(assisted(target, confu, **arguments), expected)


def test_stopping_criteria_and_eos(target, confu):
    class Longer(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] > PROMPT.shape[1] + 6])

    criteria = StoppingCriteriaList([Longer()])
    assert torch.equal(assisted(target, confu, stopping_criteria=criteria), plain(target, stopping_criteria=criteria))
    eos = int(plain(target)[0, PROMPT.shape[1] + 9])
    assert torch.equal(assisted(target, confu, eos_token_id=eos), plain(target, eos_token_id=eos))


def test_streaming(target, confu, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=assisted, args=(target, confu), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(plain(target)[0, PROMPT.shape[1] :])


def test_scores_and_logits(target, confu):
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    left, right = plain(target, **flags), assisted(target, confu, **flags)
    assert torch.equal(left.sequences, right.sequences)
    torch.testing.assert_close(torch.stack(left.scores), torch.stack(right.scores))
    torch.testing.assert_close(torch.stack(left.logits), torch.stack(right.logits))


def test_second_turn_on_a_cache(target, confu):
    cache = DynamicCache(config=target.config)
    first = assisted(target, confu, max_new_tokens=8, **cache_keyword(target, cache))
    assert 0 < cache.get_seq_length() < first.shape[1]
    prompt = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    expected = target.generate(prompt, max_new_tokens=12)
    again = target.generate(prompt, max_new_tokens=12, assistant_model=confu, **cache_keyword(target, cache))
    assert torch.equal(again, expected)


def test_left_padding(target, confu):
    mask = (torch.arange(PROMPT.shape[1]) >= 3).long()[None]
    assert torch.equal(assisted(target, confu, attention_mask=mask), plain(target, attention_mask=mask))


@pytest.fixture
def options_seen(confu):
    """The options that reach the loop."""
    seen = []

    def new_policy(options):
        seen.append(options)
        return FixedPolicy(options)

    confu.new_policy = new_policy
    return seen


def test_options_travel(target, confu, options_seen):
    expected = plain(target)
    confu.generation_config.depth = 3
    confu.generation_config.top_k = 4
    config = GenerationConfig(max_new_tokens=24, total_tokens=9, top_k=50)
    assert torch.equal(target.generate(PROMPT, generation_config=config, assistant_model=confu), expected)
    arguments = {"total_tokens": 5, "depth": 2, "draft_top_k": 2, "contemplate_tokens": 3, "contemplate": False}
    assert torch.equal(assisted(target, confu, **arguments), expected)
    assert torch.equal(assisted(target, confu, do_sample=False, top_k=7), expected)
    first, second, third = options_seen
    assert (first.total_tokens, first.depth, first.top_k, first.contemplate) == (9, 3, 4, True)
    assert (second.total_tokens, second.depth, second.top_k) == (5, 2, 2)
    assert (second.contemplate_tokens, second.contemplate) == (3, False)
    assert third.top_k == 4, "generate's own top_k is the sampler's"


def test_none_for_contemplate_tokens_means_all(target, confu, options_seen):
    confu.generation_config.contemplate_tokens = 2
    assisted(target, confu, max_new_tokens=4)
    assisted(target, confu, max_new_tokens=4, contemplate_tokens=None)
    assert [options.contemplate_tokens for options in options_seen] == [2, None]


def test_options_round_trip(target, confu, tmp_path, options_seen):
    """Every tree option is saved with the pair, and the loaded one decodes with it."""
    config = confu.generation_config
    options = TreeOptions(12, 4, 6, 0.25, 3, False, False, 7, True, "fixed", True)
    assert all(getattr(options, field.name) != field.default for field in fields(TreeOptions))
    for field in fields(TreeOptions):
        setattr(config, field.name, getattr(options, field.name))
    confu.save_pretrained(tmp_path)
    loaded = ConFuAssistant.from_pretrained(tmp_path, target=target)
    for field in fields(TreeOptions):
        assert getattr(loaded.generation_config, field.name) == getattr(options, field.name)
    loaded.new_policy = confu.new_policy
    assisted(target, loaded, max_new_tokens=4)
    assert options_seen == [options]


def test_options_without_an_assistant_are_refused_as_ever(target, confu):
    with pytest.raises(ValueError, match="not used by the model: .*total_tokens"):
        plain(target, total_tokens=3)


def test_adapter_options_of_from_target(target):
    ConFuAssistant.from_target(target, soft_prompt_type="embedding", num_experts=5, num_experts_per_token=3)
    adapter = target.confu.config
    assert isinstance(adapter, ConFuAdapterConfig)
    assert (adapter.soft_prompt_type, adapter.num_experts, adapter.num_experts_per_token) == ("embedding", 5, 3)
