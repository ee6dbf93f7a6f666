"""Parts of a layer that compute in one call: the same numbers, only where nobody else has a word in them."""

from __future__ import annotations

import pytest
import torch
from oracles import make_assistant, make_oracle
from test_products import PROMPT, pytestmark  # noqa: F401 - skips where nothing can be compiled
from tiny_models import ARCHITECTURES, tiny_llama
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from confu_hf.acceleration.attention import grouped_queries
from confu_hf.acceleration.packing import PackedLinears
from confu_hf.acceleration.products import GatedWeights, build_products
from confu_hf.gated import GatedProduct


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    return build_products(folder=tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def packed_however_small(tmp_path_factory, monkeypatch):
    """Every linear layer, in passes of one row too: what is cheapest there is a measurement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setitem(PackedLinears.__init__.__kwdefaults__, "min_elements", 0)
    monkeypatch.setattr(PackedLinears, "_cheapest_way", lambda self, shape, rows: rows)


def kinds(packed: PackedLinears) -> set[str]:
    return {type(module).__name__ for module in packed.fused}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 2, 9, 33])
@torch.no_grad()
def test_every_architecture_computes_the_same(name, rows, products):
    model = ARCHITECTURES[name](dtype=torch.float32)
    packed, ids = PackedLinears(model, products=products), torch.arange(rows)[None] % 90
    with grouped_queries(model):
        expected = model(ids).logits
        with packed.active():
            got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaDecoderLayer"}),
        ("qwen2", {"Qwen2RMSNorm", "Qwen2MLP", "Qwen2Attention", "Qwen2DecoderLayer"}),
        ("mistral", {"MistralRMSNorm", "MistralMLP", "MistralAttention", "MistralDecoderLayer"}),
        (
            "qwen3",
            {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention", "Qwen3DecoderLayer"},
        ),  # norms of queries and keys stand between
        ("granite", {"GraniteRMSNorm", "GraniteMLP", "GraniteAttention"}),  # its layers multiply what they add
        ("gemma2", set()),  # norms by 1 + weight, another activation, soft-capped attention
    ],
)
def test_parts_are_known_by_what_they_compute(name, expected, products):
    model = ARCHITECTURES[name](dtype=torch.float32)
    assert kinds(PackedLinears(model, products=products)) == expected


def test_rounded_weights_are_no_other_formula(products):
    model = tiny_llama(dtype=torch.float32)
    packed, ids = PackedLinears(model, products=products, dtype=torch.bfloat16), torch.arange(9)[None]
    assert kinds(packed) == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaDecoderLayer"}
    with torch.no_grad(), grouped_queries(model):
        expected = model(ids).logits
        with packed.active():
            got = model(ids).logits
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_computes_otherwise_is_left_alone(products):
    model = tiny_llama(dtype=torch.float32)
    model.model.layers[0].mlp.act_fn = nn.GELU()
    model.model.layers[1].input_layernorm.forward = lambda states: states
    model.model.layers[2].self_attn.q_norm = nn.Identity()
    fused = PackedLinears(model, products=products).fused
    left = {name for name, module in model.named_modules() if module not in fused}
    assert {"model.layers.0.mlp", "model.layers.1.input_layernorm", "model.layers.2.self_attn"} <= left
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= left and model.model.layers[3] in fused


@pytest.mark.parametrize(
    ("plain_shapes", "computed"),
    [
        ("none", {"norm", "attention", "layer"}),
        ("keys", {"norm", "attention", "layer"}),  # a small part of its weights
        ("mlp", {"norm", "attention"}),
        ("all", set()),  # to the bit as in plain decoding
    ],
)
@torch.no_grad()
def test_single_rows_stay_plain_where_most_weights_do(plain_shapes, computed, products, monkeypatch):
    model = tiny_llama(dtype=torch.float32)
    layer, seen = model.model.layers[0], set()
    kinds_of = {"keys": {layer.self_attn.k_proj}, "mlp": set(layer.mlp.children()), "none": set()}
    plain = {
        tuple(child.weight.shape)
        for child in kinds_of.get(plain_shapes, model.modules())
        if hasattr(child, "in_features")
    }
    assert plain_shapes in ("all", "none") or tuple(layer.self_attn.q_proj.weight.shape) not in plain
    monkeypatch.setattr(PackedLinears, "_cheapest_way", lambda self, shape, rows: 0 if shape in plain else rows)
    named = {"rms_norm": "norm", "gated_mlp": "mlp", "attention_inputs": "attention", "layer_end": "layer"}
    for name, kind in named.items():
        own = getattr(type(products), name)
        monkeypatch.setattr(type(products), name, lambda *given, own=own, kind=kind: (seen.add(kind), own(*given))[1])
    packed = PackedLinears(model, products=products)
    seen.clear()  # parts were compared with their own forwards
    with grouped_queries(model), packed.active():
        model(PROMPT[:, :1])
    assert seen == computed


@torch.no_grad()
def test_silu_over_the_whole_range(products):
    values = torch.cat([torch.linspace(-120, 120, 5001), torch.tensor([0.0, -0.0, 1e-30, float("inf"), float("nan")])])
    width = len(values)
    eye, ones = torch.eye(width), torch.zeros(width, width)
    ones[:, 0] = 1.0
    rows = torch.zeros(1, width)
    rows[0] = values.nan_to_num(0.0, 3e38)
    identity, first = products.pack(eye), products.pack(ones)
    rows[0, 0] = 1.0  # what `up` gives everywhere
    got = products.gated_mlp(rows, GatedWeights(identity, first, identity, width))
    torch.testing.assert_close(got, F.silu(rows), rtol=3e-7, atol=1e-36)
    small = GatedWeights(*[products.pack(torch.eye(5))] * 3, 5)
    assert products.gated_mlp(values[None, -5:].contiguous(), small)[0, -1].isnan()


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("inside", [["self_attn.k_proj", "mlp.up_proj"], ["input_layernorm"], ["self_attn", "mlp"]])
@torch.no_grad()
def test_hooks_on_what_is_inside_are_heard(inside, hook, products):
    model = tiny_llama(dtype=torch.float32)
    packed, heard = PackedLinears(model, products=products), []
    for name in inside:
        getattr(model.model.layers[2].get_submodule(name), hook)(lambda *_, name=name: heard.append(name))
    with grouped_queries(model), packed.active():
        model(PROMPT)
    assert heard == inside


@torch.no_grad()
def test_a_layer_that_takes_the_place_of_another_is_asked(products):
    model = tiny_llama(dtype=torch.float32)
    packed, mlp = PackedLinears(model, products=products), model.model.layers[1].mlp
    mlp.gate_proj = nn.Sequential(mlp.gate_proj, nn.Dropout(1.0).train())  # nothing passes
    with grouped_queries(model), packed.active():
        assert not mlp(torch.randn(1, 4, mlp.up_proj.in_features)).any()
        model.model.layers[2].post_attention_layernorm = nn.Identity()
        got = model(PROMPT).logits
    torch.testing.assert_close(got, model(PROMPT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["self_attn", "self_attn.v_proj", "post_attention_layernorm", "mlp", "mlp.down_proj"])
@torch.no_grad()
def test_a_forward_that_takes_the_place_of_another_is_asked(name, products):
    """As accelerate's hooks do, after weights were packed."""
    model = tiny_llama(dtype=torch.float32)
    packed, module, asked = PackedLinears(model, products=products), model.model.layers[1].get_submodule(name), []
    own = module.forward
    module.forward = lambda *given, **more: (asked.append(name), own(*given, **more))[1]
    with grouped_queries(model), packed.active():
        model(PROMPT)
    assert asked == [name]


@pytest.mark.parametrize("argument", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"scaling": 0.123}])
def test_attention_that_asks_for_more_is_left_alone(argument, products, monkeypatch):
    """However little it may change: what it hands to the attention function tells."""
    model = tiny_llama(dtype=torch.float32)
    interface = type(AttentionInterface()).get_interface
    monkeypatch.setattr(
        type(AttentionInterface()),
        "get_interface",
        lambda self, *names: lambda *states, **given: interface(self, *names)(*states, **given | argument),
    )
    assert "LlamaAttention" not in kinds(PackedLinears(model, products=products))


@torch.no_grad()
def test_norms_and_biases_that_were_replaced_are_seen(products):
    """Norms at once; biases, which lie with packed weights, when the next call asks whether these are stale."""
    for name, child in (("qwen3", "q_norm"), ("qwen3", "k_norm"), ("qwen2", "k_proj")):
        model = ARCHITECTURES[name](dtype=torch.float32)
        packed, module = PackedLinears(model, products=products), model.model.layers[1].self_attn.get_submodule(child)
        field = "bias" if name == "qwen2" else "weight"
        assert not packed.is_stale()
        setattr(module, field, nn.Parameter(torch.randn_like(getattr(module, field)), requires_grad=False))
        if field == "bias":
            assert packed.is_marked() and packed.is_stale()
            packed = PackedLinears(model, products=products)
        with grouped_queries(model):
            expected = model(PROMPT).logits
            with packed.active():
                torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_random_stream_is_the_users(products):
    model, before = tiny_llama(dtype=torch.float32), torch.get_rng_state()
    assert PackedLinears(model, products=products).fused
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
def test_the_same_text_in_batches_and_with_contemplation(name):
    model = ARCHITECTURES[name](dtype=torch.float32)
    prompts = torch.stack([torch.arange(3, 12), torch.arange(13, 22)])
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompts, **arguments)
    for assistant in (make_oracle(model), make_assistant(model, lora_rank=2)):
        got = model.generate(prompts, assistant_model=assistant.compile(), total_tokens=9, policy="fixed", **arguments)
        assert assistant.stats.compiled and torch.equal(got, expected)
        assistant.detach()


GATED = ["llama", "qwen2", "qwen3", "granite", "gemma2"]  # whole layers, heads with biases or norms, parts, nothing


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(("rank", "rows"), [(2, 3), (16, 1), (19, None)])
@torch.no_grad()
def test_a_gated_lora_is_computed_in_the_same_calls(name, rank, rows, products, monkeypatch):
    model = ARCHITECTURES[name](dtype=torch.float32)
    low_rank = make_assistant(model, lora_rank=rank).contemplator(model).low_rank
    packed, hooked = PackedLinears(model, products=products), set()
    ids, own = torch.stack([PROMPT[0], PROMPT[0].flip(0)]), GatedProduct.__call__
    monkeypatch.setattr(GatedProduct, "__call__", lambda self, *given: (hooked.add(given[0]), own(self, *given))[1])
    with grouped_queries(model):
        with low_rank.acting(rows):
            expected = model(ids).logits
        hooked.clear()
        with packed.active():
            without = model(ids).logits
            with low_rank.acting(rows):
                got = model(ids).logits
    changed = 0 if rows is None else ids.shape[1] - rows
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, :changed], without[:, :changed], rtol=1e-4, atol=1e-4)
    assert ((got - without)[:, changed:].abs().amax((1, 2)) > 0.01).all()
    layer = model.model.layers[1]
    alone = {"gemma2": {*layer.self_attn.children(), *layer.mlp.children()}, "granite": {layer.self_attn.o_proj}}
    assert {module for module in hooked if module in set(layer.modules())} >= alone.get(name, set()) - {
        layer.mlp.act_fn
    }
    assert hooked if name in alone else not hooked


@torch.no_grad()
def test_a_gated_lora_of_another_thread_is_not(products):
    """Its hooks are on the target that both use; this thread's pass has other rows."""
    model = tiny_llama(dtype=torch.float32)
    low_rank = make_assistant(model, lora_rank=2).contemplator(model).low_rank
    packed = PackedLinears(model, products=products)
    with grouped_queries(model), packed.active():
        expected = model(PROMPT).logits
        with low_rank.acting(3):
            low_rank.call.thread = -1
            assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("size", [4, 4096, 2**16 - 4, 2**16 + 4, 200_004])
@torch.no_grad()
def test_a_checksum_knows_every_word_and_its_place(size, products):
    weight = torch.randn(size // 4)
    known = products.checksum(weight)
    for place in {0, size // 8, size // 4 - 1}:
        changed = weight.clone()
        changed[place] += 1e-3
        assert not torch.equal(products.checksum(changed), known)
        changed[place] = weight[place]
        assert torch.equal(products.checksum(changed), known)
    assert size == 4 or not torch.equal(products.checksum(weight.flip(0)), known)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(2, threads))
    again = products.checksum(weight)
    torch.set_num_threads(threads)
    assert torch.equal(again, known)


@torch.no_grad()
def test_a_changed_weight_is_seen(products):
    model = tiny_llama(dtype=torch.float32)
    packed = PackedLinears(model, products=products)
    assert not packed.is_stale()
    model.model.layers[3].mlp.up_proj.weight.data[5, 7] += 1e-3  # neither address nor version
    assert not packed.is_marked() and packed.is_stale()
