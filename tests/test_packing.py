"""Packed linear layers compute what the plain ones do, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import make_oracle
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from torch import nn

from confu_hf import compat
from confu_hf.acceleration import decoding, packing
from confu_hf.acceleration.packing import FILLED_ROWS, PackedLinears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
no_bfloat16 = pytest.mark.skipif(not compat.has_bfloat16_kernels(), reason="this CPU has no bfloat16")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=no_bfloat16)])


def pack(*modules: nn.Module, **kwargs) -> PackedLinears:
    return PackedLinears(*modules, **{"min_elements": 0, **kwargs})


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias, dtype=dtype)


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 1, 48), (1, 9, 48), (2, 17, 48), (1, 65, 48)])
@torch.no_grad()
def test_equal_to_the_plain_layer_up_to_rounding(dtype, bias, shape):
    layer, x = linear(bias, dtype), torch.randn(shape).to(dtype)
    packed = pack(layer)
    with packed.active():
        got = layer(x)
    assert len(packed) == 1 and got.shape == (*shape[:-1], 80) and got.dtype == dtype
    torch.testing.assert_close(got, layer(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_few_rows_may_go_another_way(rows):
    """The plain product, the packed one, or the packed one of more rows; what is filled in changes no result."""
    layer, input = linear(), torch.randn(9, 48)
    packed = pack(layer)
    assert set(packed.few_rows) == {(80, 48)} and packed.few_rows[80, 48][rows] in (0, rows, FILLED_ROWS)
    shapes = {}
    for way in (0, rows, FILLED_ROWS):
        packed.few_rows = {(80, 48): {rows: way}}
        with packed.active(), torch.profiler.profile(record_shapes=True) as profile:
            few = layer(input[:rows])
            many = layer(input)
        products = [event for event in profile.events() if event.name == "mkldnn::_linear_pointwise"]
        shapes[way] = [event.input_shapes[0][0] for event in products]
        torch.testing.assert_close(few, layer(input[:rows]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(many, layer(input), rtol=1e-5, atol=1e-5)
    assert shapes == {0: [9], rows: [rows, 9], FILLED_ROWS: [FILLED_ROWS, 9]}


@no_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products_in_another_dtype(bias):
    layer, x = linear(bias), torch.randn(1, 9, 48)
    with pack(layer, dtype=torch.bfloat16).active():
        got = layer(x)
    assert got.dtype == torch.float32
    rounded = copy.deepcopy(layer).bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(got, rounded, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(got, layer(x), rtol=1e-5, atol=1e-5), "the products were not rounded"


def test_without_onednn_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    assert not compat.multiplies_bfloat16()


@pytest.mark.parametrize("bfloat16", [True, False])
def test_only_the_draft_is_rounded(monkeypatch, bfloat16):
    """float32 target and draft: the target's products stay in float32, whatever the CPU can do."""
    target = tiny_llama(dtype=torch.float32)
    confu, asked = tiny_pair(target), {}
    monkeypatch.setattr(decoding, "multiplies_bfloat16", lambda: bfloat16)
    real = decoding.packed_linears

    def spy(model, wanted, dtype=None, products=None):
        asked[model] = dtype
        return real(model, wanted, dtype, products)

    monkeypatch.setattr(decoding, "packed_linears", spy)
    target.generate(torch.arange(3, 9)[None], assistant_model=confu, max_new_tokens=3)
    assert asked == {target: None, confu: torch.bfloat16 if bfloat16 else None}


@torch.no_grad()
def test_strided_and_empty_inputs():
    layer = linear()
    with pack(layer).active():
        for x in (torch.randn(48, 6).t(), torch.randn(1, 6, 96)[..., ::2], torch.randn(1, 0, 48)):
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@dtypes
@torch.no_grad()
def test_a_whole_model_with_a_tied_head(dtype):
    model = tiny_llama(dtype=dtype, tie_word_embeddings=True)
    ids = torch.arange(3, 12)[None]
    packed, plain = pack(model), model(ids).logits
    assert len(packed) == 8 * 7 + 1
    with packed.active():
        got = model(ids).logits
    tolerance = 30 * TOLERANCE[dtype]  # rounding grows through eight layers
    torch.testing.assert_close(got, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_the_packed_copy_is_what_is_used():
    layer, x = linear(), torch.randn(4, 48)
    packed, expected = pack(layer), layer(x)
    layer.weight.zero_()
    with packed.active():
        torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), expected)


@torch.no_grad()
def test_a_shared_weight_is_packed_once():
    first, second = linear(), linear()
    second.weight = first.weight
    packed = pack(nn.ModuleList([first, second]), first)
    assert len(packed) == 2 and packed._packed[0].weight is packed._packed[1].weight


def test_forward_is_put_back_even_after_an_exception():
    layer = linear()
    packed = pack(layer)
    with pytest.raises(RuntimeError, match="stop"), packed.active():
        assert "forward" in layer.__dict__
        raise RuntimeError("stop")
    assert "forward" not in layer.__dict__
    with packed.active(), packed.active():
        pass
    assert "forward" not in layer.__dict__


class QuantizedLinear(nn.Linear):
    """Stands for the linear layers of quantization libraries."""


def test_foreign_layers_are_left_alone():
    hooked = linear()
    hooked.forward = lambda x: x
    others = [QuantizedLinear(48, 80), linear().double(), linear().half(), linear().to("meta"), nn.Conv1d(3, 3, 1)]
    assert len(pack(hooked, *others)) == 0
    assert len(pack(linear(), min_elements=48 * 80 + 1)) == 0


def test_a_hook_added_after_packing_is_kept():
    layer = linear()
    packed = pack(layer)
    layer.forward = lambda x: x
    with packed.active():
        assert layer(1) == 1
    assert layer(1) == 1


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert len(pack(linear())) == 0


def test_gradients_other_dtypes_and_many_rows_use_the_plain_path():
    layer, x = linear(), torch.randn(9, 48)
    with pack(layer).active():
        layer(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(80, -1))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.double())
    many = torch.randn(65, 48)
    with torch.no_grad(), pack(layer).active():
        got = layer(many)
    assert torch.equal(got, layer(many))


@torch.no_grad()
def test_changed_weights_are_noticed():
    def changed(change) -> bool:
        layer = linear()
        packed = pack(layer)
        assert not packed.is_stale()
        change(layer)
        return packed.is_stale()

    assert changed(lambda layer: layer.weight.mul_(2))
    assert changed(lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.clone())))
    assert changed(lambda layer: layer.weight.data.add_(1))  # as PEFT merges adapters: no new version, same address
    assert changed(lambda layer: layer.to(torch.bfloat16))
    assert not changed(lambda layer: layer.bias.add_(1))


def _through_numpy(weight):
    weight.detach().numpy()[7, 3] += 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data[1:6].mul_(9.0),
        lambda weight: weight.data[:, 5].mul_(9.0),
        lambda weight: weight.data[-1, -1].neg_(),
        lambda weight: weight.data.copy_(weight.data.flip(0)),
        lambda weight: weight.data.copy_(weight.data.flip(1)),
        _through_numpy,
    ],
    ids=["rows", "column", "one element", "rows exchanged", "columns exchanged", "numpy view"],
)
@pytest.mark.parametrize("shape", [(48, 80), (47, 81), (1100, 7)])
@torch.no_grad()
def test_any_change_that_leaves_no_mark_on_the_tensor_is_seen(change, shape):
    torch.manual_seed(0)
    layer = nn.Linear(*reversed(shape))
    packed = pack(layer)
    address, version = layer.weight.data_ptr(), layer.weight._version
    assert not packed.is_stale()
    change(layer.weight)
    assert (layer.weight.data_ptr(), layer.weight._version) == (address, version)
    assert packed.is_stale()


def test_generate_follows_a_head_changed_behind_its_back():
    """With default options, between two calls."""
    target = tiny_llama(dtype=torch.float32, vocab_size=97, hidden_size=2048, num_hidden_layers=7, head_dim=512)
    confu = tiny_pair(target)
    prompt = torch.arange(3, 14)[None]
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    before = target.generate(prompt, assistant_model=confu, **arguments)
    target.lm_head.weight.data[1:6].mul_(9.0)
    expected = target.generate(prompt, **arguments)
    assert not torch.equal(before, expected)
    assert torch.equal(target.generate(prompt, assistant_model=confu, **arguments), expected)


@pytest.mark.parametrize("way", [0, 1])
def test_weights_are_looked_at_when_a_pass_has_several_rows(monkeypatch, way):
    """Where single rows go the plain way, a call that verifies roots alone neither reads the weights nor switches any
    layer; the first pass of more rows finds out what has changed since."""
    monkeypatch.setitem(PackedLinears.__init__.__kwdefaults__, "min_elements", 0)
    monkeypatch.setattr(PackedLinears, "_cheapest_way", lambda self, shape, rows: rows * way)
    target, looked_at = tiny_llama(dtype=torch.float32), []
    real = packing._checksum
    monkeypatch.setattr(
        packing, "_checksum", lambda weight, *more: looked_at.append(weight.shape) or real(weight, *more)
    )
    oracle, prompt = make_oracle(target), torch.arange(3, 14)[None]
    arguments = {"max_new_tokens": 12, "do_sample": False, "policy": "fixed", "contemplate": False, "lookup": False}

    def checked(**options) -> int:
        looked_at.clear()
        expected = target.generate(prompt, max_new_tokens=12, do_sample=False)
        assert torch.equal(target.generate(prompt, assistant_model=oracle, **arguments, **options), expected)
        assert oracle.stats.single_rows_plain == (way == 0)
        return len(looked_at) // 57  # linear layers

    assert checked(total_tokens=4) > 0  # the first call packs
    assert checked(total_tokens=0) == way
    assert "forward" not in target.lm_head.__dict__
    assert checked(total_tokens=4) == 1
    target.lm_head.weight.data[1:6].mul_(9.0)
    assert checked(total_tokens=0) == way * 2
    assert checked(total_tokens=4) == 1 + (way == 0)


@torch.no_grad()
def test_a_changed_bias_needs_no_packing():
    layer, x = linear(), torch.randn(4, 48)
    packed = pack(layer)
    layer.bias.add_(1)
    with packed.active():
        got = layer(x)
    torch.testing.assert_close(got, layer(x))
