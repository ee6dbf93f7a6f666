"""The table of errors: each says what was got, what was expected and what to do, and leaves the target usable."""

from __future__ import annotations

import shutil

import pytest
import torch
from assisted_calls import DRAFT, PROMPT
from refusals import refused, rewrite
from tiny_models import tiny_llama, tiny_qwen3, tiny_target
from transformers import DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from confu_hf import ConFuAssistant
from confu_hf.adapter import layer
from confu_hf.compat import cache_keyword
from confu_hf.modeling_confu import ConFuDraftModel


@pytest.fixture
def folder(tmp_path):
    """A saved pair that is on no target."""
    ConFuAssistant.from_target(tiny_llama(), **DRAFT).save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


def generate(target, confu, prompt=PROMPT, **kwargs):
    return lambda: target.generate(prompt, assistant_model=confu, **{"max_new_tokens": 6, **kwargs})


ATTACH = r"Call ConFuAssistant.from_pretrained\(path, target=model\) or confu.attach\(model\)"


def test_a_target_that_was_never_attached(target, confu):
    stranger = tiny_llama()
    refused(
        ["No ConFu adapter is attached to the target: got", "expected", ATTACH], generate(stranger, confu), stranger
    )


def test_a_target_without_adapter(target, confu):
    other = tiny_llama()
    ConFuAssistant.from_target(other, contemplate=False)
    message = ["No ConFu adapter is attached to the target: got one without a ConFu adapter, expected", ATTACH]
    refused(message, generate(other, confu), other)
    assert generate(other, confu, contemplate=False)().shape[1] == PROMPT.shape[1] + 6


def test_attach_without_any_adapter(confu):
    other = tiny_llama()
    bare = ConFuAssistant(confu.config).double()
    refused(["No ConFu adapter is attached", "got one without", ATTACH], lambda: bare.attach(other), other)
    assert type(other) is type(tiny_llama()), "a refused attachment changes nothing"


@pytest.mark.native_peft
def test_disabled_adapters_asked_to_contemplate(folder):
    target = tiny_llama()
    target.load_adapter(str(folder / "adapter"))
    confu = ConFuAssistant.from_pretrained(folder, dtype="float64")
    target.disable_adapters()
    message = ["got one whose ConFu adapters are not active, expected the adapter"]
    refused(message, generate(target, confu, contemplate=True), target)


def test_an_assistant_cannot_write_by_itself(target, confu):
    refused(["got a target that does not know its assistant", ATTACH], lambda: confu.generate(PROMPT), target)


@pytest.mark.parametrize(
    ("other", "got", "expected"),
    [
        ({"hidden_size": 48}, "target_hidden_size=32", "48"),
        ({"num_hidden_layers": 10}, "target_num_hidden_layers=8", "10"),
        ({"vocab_size": 101}, "vocab_size=97", "101"),
    ],
)
def test_draft_of_another_target(target, confu, folder, other, got, expected):
    stranger = tiny_llama(**other)
    message = [
        "The ConFu draft was made for another target",
        f"got {got}, expected {expected}",
        "Load the pair trained",
    ]
    refused(message, lambda: ConFuAssistant.from_pretrained(folder, target=stranger), stranger)
    confu.detach()
    refused(message, lambda: confu.attach(stranger), stranger)
    assert not hasattr(stranger, "confu") and not hasattr(stranger, "peft_config")
    ConFuAssistant.from_target(stranger, **DRAFT)
    refused(message, generate(stranger, confu), stranger)


def test_draft_of_another_model_type(confu, target):
    confu.detach()
    stranger = tiny_qwen3()
    refused(["got target_model_type='llama', expected 'qwen3'"], lambda: confu.attach(stranger), stranger)


def test_adapter_of_another_target_in_the_repository(folder, tmp_path):
    other = ConFuAssistant.from_target(tiny_llama(num_key_value_heads=4), **DRAFT)
    other.save_pretrained(tmp_path / "other")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(tmp_path / "other" / "adapter", folder / "adapter")
    target = tiny_llama()
    message = ["The ConFu adapter was made for another target", "got num_key_value_heads=4, expected 2", "Load the"]
    refused(message, lambda: ConFuAssistant.from_pretrained(folder, target=target), target)
    assert not hasattr(target, "confu") and type(target) is type(tiny_llama())


def test_adapter_with_other_layers_than_the_draft(target):
    ConFuAssistant.from_target(target, target_layer_ids=[1, 2, 3])
    stranger = ConFuAssistant.from_target(tiny_llama(), target_layer_ids=[2, 4, 5])
    message = [r"got target_layer_ids=\[1, 2, 3\], expected \[2, 4, 5\], those of the draft", "the same repository"]
    refused(message, generate(target, stranger), target)


def test_a_detached_assistant_does_not_borrow_the_adapter_of_another(target, confu):
    other = ConFuAssistant.from_target(target, **DRAFT)
    confu.detach()
    message = [
        r"not attached to the target: got an active adapter \('contemplate_1'\) that another assistant brought",
        r"expected its own, or one that PEFT loaded. Call confu.attach\(model\)",
    ]
    refused(message, generate(target, confu), target)
    assert generate(target, confu, contemplate=False)().shape[1] == PROMPT.shape[1] + 6, "it needs no adapter"
    for assistant in (confu.attach(target), other):
        assert generate(target, assistant)().shape[1] == PROMPT.shape[1] + 6


def test_wrong_dtype(target, confu):
    message = [
        "differ in dtype: got a draft in torch.float32, expected torch.float64",
        r"Call confu.to\(torch.float64\)",
    ]
    refused(message, generate(target, confu.float()), target)
    assert generate(target, confu.double())().shape[1] == PROMPT.shape[1] + 6


def test_wrong_device(target, confu):
    message = ["on different devices: got a draft on meta, expected cpu", r'Call confu.to\("cpu"\)']
    refused(message, generate(target, confu.to("meta")), target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, ["got num_beams=3, expected 1", "Set num_beams=1"]),
        ({"use_cache": False}, ["got use_cache=False, expected True", "Set use_cache=True"]),
        (
            {"cache_implementation": "quantized"},
            ["got cache_implementation='quantized', expected None, 'dynamic' or 'static'", "Leave out"],
        ),
        ({"cache_implementation": "offloaded"}, ["got cache_implementation='offloaded'"]),
        ({"cache_implementation": "offloaded_static"}, ["got cache_implementation='offloaded_static'"]),
        (
            {"return_dict_in_generate": True, "output_attentions": True},
            [
                "got output_attentions=True, expected attn_implementation='eager', since 'sdpa' computes no attention",
                "Call",
            ],
        ),
        ({"prefill_chunk_size": 0}, ["got prefill_chunk_size=0, expected 1 or more, or None. Leave it out to read"]),
        ({"prompt_lookup_num_tokens": 3}, ["got prompt_lookup_num_tokens=3, expected None", "one way of drafting"]),
        ({"dola_layers": "high"}, ["got dola_layers='high', expected None", "Leave out the assistant for DoLa"]),
        ({"synced_gpus": True}, ["got synced_gpus=True, expected", "Leave out the assistant"]),
        (
            {"position_ids": torch.arange(11).expand(3, 1, -1)},
            [r"got position_ids of shape \(3, 1, 11\), expected \(1, 11\), as input_ids. Pass"],
        ),
        ({"labels": PROMPT}, [r"got model inputs \['labels'\], expected none but", "Leave them out"]),
    ],
)
def test_what_generate_is_asked(target, confu, arguments, message):
    refused(["generate with a ConFu assistant", *message], generate(target, confu, **arguments), target)
    assert generate(target, confu)().shape[1] == PROMPT.shape[1] + 6


class _Streamer(BaseStreamer):
    def put(self, value):
        """Takes anything."""

    def end(self):
        """Done."""


def test_a_streamer_with_a_batch(target, confu):
    message = ["got a streamer with a batch of 2, expected one prompt, whose tokens come in order. Leave out"]
    refused(message, generate(target, confu, prompt=PROMPT.repeat(2, 1), streamer=_Streamer()), target)


def test_a_cache_of_another_batch_size(target, confu):
    cache = DynamicCache(config=target.config)
    target(PROMPT[:, :4], **cache_keyword(target, cache))
    message = ["got a cache of 1 rows with a batch of 2, expected as many. Repeat the cache"]
    refused(message, generate(target, confu, prompt=PROMPT.repeat(2, 1), **cache_keyword(target, cache)), target)


def test_a_static_cache_that_is_too_small(target, confu):
    cache = StaticCache(config=target.config, max_cache_len=15)
    call = generate(target, confu, **cache_keyword(target, cache))
    refused(
        ["got a StaticCache for 15 tokens, expected room for 16, prompt and answer. Pass StaticCache"], call, target
    )
    assert not cache.get_seq_length()


def test_a_static_cache_of_another_batch_size(target, confu):
    cache = StaticCache(config=target.config, max_cache_len=64)
    cache.early_initialization(1, 2, 8, target.dtype, target.device)
    message = ["got a cache of 1 rows with a batch of 2, expected as many"]
    refused(message, generate(target, confu, prompt=PROMPT.repeat(2, 1), **cache_keyword(target, cache)), target)


@pytest.mark.parametrize("handed_in", [True, False])
def test_attention_weights_with_a_static_cache(confu, handed_in):
    target = tiny_llama(attn_implementation="eager")
    confu.detach()
    confu.attach(target)
    options = {"return_dict_in_generate": True, "output_attentions": True, "cache_implementation": "static"}
    message = ["got cache_implementation='static', expected None with output_attentions. Leave out"]
    if handed_in:
        del options["cache_implementation"]
        options |= cache_keyword(target, StaticCache(config=target.config, max_cache_len=64))
        message = ["got output_attentions=True with a static cache, expected a dynamic one. Pass DynamicCache"]
    refused(message, generate(target, confu, **options), target)


def test_a_cache_that_offloads(target, confu):
    """Empty caches too are looked at before the call, not when it ends."""
    cache = DynamicCache(config=target.config)
    cache.offloading = True
    message = ["The cache that was passed in: got a DynamicCache that offloads its layers, expected one whose"]
    refused(message, generate(target, confu, **cache_keyword(target, cache)), target)


def test_a_prompt_without_its_cached_part(target, confu):
    """Without a mask of all tokens nothing tells that it is new."""
    cache = DynamicCache(config=target.config)
    target(PROMPT, **cache_keyword(target, cache))
    message = [
        "got 2 input_ids on top of a cache of 11 tokens, expected the whole prompt in input_ids",
        "Pass the conversation so far.*or new ids with an attention_mask",
    ]
    refused(message, generate(target, confu, prompt=torch.tensor([[5, 6]]), **cache_keyword(target, cache)), target)
    assert cache.get_seq_length() == 11


def test_embeddings_without_a_token(target, confu):
    embeddings = target.get_input_embeddings()(PROMPT)[:, :0]
    call = lambda: target.generate(inputs_embeds=embeddings, assistant_model=confu, max_new_tokens=6)  # noqa: E731
    refused(["expected a token to go on from"], call, target)


def test_embeddings_with_ids_of_another_length(target, confu):
    """Plain `generate` counts positions by the ids then, and fails in the middle; with a mask of the embeddings it works."""
    embeddings = target.get_input_embeddings()(PROMPT)
    message = [r"got an attention_mask of shape \(1, 3\), expected \(1, 11\), as inputs_embeds. Pass"]
    refused(message, generate(target, confu, prompt=PROMPT[:, :3], inputs_embeds=embeddings), target)


def test_an_empty_prompt(target, confu):
    message = [r"got an empty prompt \(input_ids without a token\), expected a token to go on from. Pass at least one"]
    refused(message, generate(target, confu, prompt=PROMPT[:, :0]), target)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_a_mask_of_another_length(target, confu, name):
    message = [rf"got .*{name}.* of shape \(1, 5\), expected \(1, 11\), as input_ids. Pass"]
    refused(message, generate(target, confu, **{name: torch.ones(1, 5, dtype=torch.long)}), target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_tokens": -1}, "got total_tokens=-1, expected an integer of at least 0. Set"),
        ({"total_tokens": 2.5}, "got total_tokens=2.5, expected an integer"),
        ({"total_tokens": True}, "got total_tokens=True, expected an integer"),
        ({"confidence_threshold": 1.0}, "got confidence_threshold=1.0, expected a number of at least 0, below 1. Set"),
        ({"confidence_threshold": "low"}, "got confidence_threshold='low', expected a number"),
        ({"depth": 0}, "got depth=0, expected an integer of at least 1"),
        ({"draft_top_k": 0}, "got top_k=0, expected an integer of at least 1, at most 50. Set .* pass `draft_top_k`"),
        ({"draft_top_k": 51}, "got top_k=51, expected an integer of at least 1, at most 50"),
        ({"contemplate_tokens": 0}, "got contemplate_tokens=0, expected an integer of at least 1"),
        ({"contemplate": "yes"}, "got contemplate='yes', expected one of"),
        ({"pack_weights": 1}, "got pack_weights=1, expected one of"),
    ],
)
def test_tree_options(target, confu, options, message):
    refused(["Tree options: " + message], generate(target, confu, **options), target)
    for name, value in options.items():
        setattr(confu.generation_config, name.removeprefix("draft_"), value)
    refused(["Tree options: " + message], generate(target, confu), target)


def test_eagle_draft_asked_to_contemplate():
    target = tiny_llama()
    eagle = ConFuAssistant.from_target(target, contemplate=False, draft_vocab_size=50)
    message = ["This draft cannot contemplate: got contemplate=True for an EAGLE-3 draft", "Load a ConFu pair"]
    refused(message, generate(target, eagle, contemplate=True), target)


def test_state_space_target():
    target = tiny_target("mamba", state_size=4, attn_implementation="eager")
    for call in (
        lambda: ConFuAssistant.from_target(target),
        lambda: ConFuAssistant.from_target(target, contemplate=False),
    ):
        with pytest.raises(ValueError, match="MambaForCausalLM|num_attention_heads"):
            call()
    assert type(target).__mro__[0] is type(tiny_target("mamba", state_size=4, attn_implementation="eager"))
    assert target.generate(PROMPT, max_new_tokens=3).shape[1] == PROMPT.shape[1] + 3


def test_encoder_decoder_target(confu, folder):
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    target = T5ForConditionalGeneration(config).eval()
    for call in (
        lambda: ConFuAssistant.from_target(target),
        lambda: ConFuAssistant.from_pretrained(folder, target=target),
        lambda: ConFuAssistant.from_pretrained(folder).attach(target),
    ):
        with pytest.raises(ValueError, match="got an encoder-decoder, expected a decoder-only model. Load"):
            call()
    assert target.generate(PROMPT, max_new_tokens=3).shape == (1, 4)


def test_something_that_is_no_model(confu):
    confu.detach()
    with pytest.raises(ValueError, match="got a Linear, expected a Transformers model or a PeftModel"):
        confu.attach(torch.nn.Linear(2, 2))


def test_weights_are_looked_at_once_a_version(target, confu, monkeypatch):
    """Not at every call; but an adapter with a new content, wherever it came from, is looked at before its use."""
    looked = []
    check = layer.check_adapter_weights
    monkeypatch.setattr(
        layer, "check_adapter_weights", lambda *args, **kwargs: (looked.append(1), check(*args, **kwargs))
    )
    for _ in range(3):
        generate(target, confu)()
    assert len(looked) == 1
    weight = target.confu.confu_experts["contemplate"].weight
    kept = weight.detach().clone()
    message = ["`confu_experts` of adapter 'contemplate' on the target: got NaN or infinite weights"]
    with torch.no_grad():
        weight[0, 0] = float("nan")
    refused(message, generate(target, confu), target)
    refused(message, generate(target, confu), target)
    with torch.no_grad():
        weight.copy_(kept)
    generate(target, confu)()
    looked.clear()
    generate(target, confu)()
    assert not looked
    target.confu.confu_experts["contemplate"].weight = torch.nn.Parameter(torch.full_like(kept, float("inf")))
    refused(message, generate(target, confu), target)


@pytest.mark.native_peft
def test_an_adapter_that_transformers_loaded_is_checked_before_use(folder):
    """`load_adapter` has no hook after its loading: what it left out or loaded as NaN is seen by `generate`."""
    key = "base_model.model.confu.confu_experts.weight"
    rewrite(folder / "adapter" / "adapter_model.safetensors", lambda weights: weights.pop(key))
    target = tiny_llama()
    target.load_adapter(str(folder / "adapter"))
    confu = ConFuAssistant(ConFuAssistant.config_class.from_pretrained(folder)).double()
    message = ["`confu_experts` of adapter 'default' on the target: got NaN or infinite weights"]
    refused(message, generate(target, confu), target)


def test_a_bare_draft_is_no_assistant(target, confu):
    draft = ConFuDraftModel(confu.config).double()
    message = ["got a ConFuDraftModel, expected a ConFuAssistant. Load it with ConFuAssistant.from_pretrained"]
    refused(message, generate(target, draft), target)
