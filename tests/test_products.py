"""Compiled products compute what linear layers do, are built once, and come and go with `compile()`."""

from __future__ import annotations

import copy
import pickle
import platform
import shutil
import sys

import pytest
import torch
from oracles import make_assistant, make_oracle
from tiny_models import tiny_gemma3, tiny_llama, tiny_qwen3
from torch import nn

from confu_hf.acceleration import packing
from confu_hf.acceleration.packing import PackedLinears
from confu_hf.acceleration.products import FLAGS, build_products

CAPABILITY = torch.backends.cpu.get_cpu_capability()
KINDS = ["AVX2", "AVX512"] if CAPABILITY == "AVX512" else ["AVX2"]
PROMPT = torch.arange(3, 12)[None]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or CAPABILITY not in FLAGS
    or not (shutil.which("g++") or shutil.which("clang++"))
    or not torch.backends.mkldnn.is_available(),
    reason="no C++ compiler, or a processor without AVX2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def cache_folder(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.mark.parametrize("capability", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17, 64])
@pytest.mark.parametrize(("width", "features"), [(48, 96), (33, 1), (7, 131), (250, 49)])
def test_equal_to_the_plain_product_up_to_rounding(capability, rows, width, features):
    products = build_products(capability)
    torch.manual_seed(rows)
    weight, input = torch.randn(features, width), torch.randn(1, rows, width)
    got = products(input, products.pack(weight), features)
    expected = nn.functional.linear(input.double(), weight.double()).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", KINDS)
@pytest.mark.parametrize("rows", [1, 8, 17])
def test_weights_in_bfloat16_are_widened(capability, rows):
    products = build_products(capability)
    weight, input = torch.randn(131, 250).bfloat16(), torch.randn(rows, 250)
    panels = products.pack(weight)
    assert panels.dtype == torch.bfloat16
    assert torch.equal(products(input, panels, 131), products(input, products.pack(weight.float()), 131))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_influence_each_other(threads):
    """A row of NaN beside it changes no bit of a row, and the number of threads changes none either."""
    products = build_products()
    weight, input = torch.randn(200, 64), torch.randn(9, 64)
    panels = products.pack(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = products(input, panels, 200)
        beside = input.clone()
        beside[3] = float("nan")
        got = products(beside, panels, 200)
    finally:
        torch.set_num_threads(before)
    assert got[3].isnan().all()
    others = [row for row in range(9) if row != 3]
    assert torch.equal(got[others], alone[others])
    assert torch.equal(alone, products(input, panels, 200))


@pytest.mark.parametrize("capability", KINDS)
def test_a_row_is_the_same_to_the_bit_among_any_number_of_rows(capability):
    products = build_products(capability)
    weight, input = torch.randn(70, 500), torch.randn(64, 500)
    panels = products.pack(weight)
    among_all = products(input, panels, 70)
    for rows in (1, 2, 5, 8, 9, 12, 17, 33):
        assert torch.equal(products(input[:rows], panels, 70), among_all[:rows])


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_layers_compute_with_them(bias):
    layer, input = nn.Linear(48, 80, bias=bias), torch.randn(2, 5, 96)[..., ::2]
    packed = PackedLinears(layer, min_elements=0, products=build_products())
    assert packed.compiled
    packed.few_rows = {}
    with packed.active(), torch.profiler.profile() as profile:
        got = layer(input)
        empty = layer(input[:0])
    assert not any("linear" in event.key for event in profile.key_averages())
    assert empty.shape == (0, 5, 80)
    torch.testing.assert_close(got, layer(input), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("plain_seconds", "way"), [(0.9, 0), (1.0, 0), (1.04, 0), (1.2, 1)])
@torch.no_grad()
def test_single_rows_stay_plain_where_products_gain_little(monkeypatch, plain_seconds, way):
    """Seconds are those of the plain product in products; compiled ones take any number of rows as it is."""
    clock, tried = [0.0], set()

    def timed(packed, max_rows, few_rows):
        ((rows, filled),) = few_rows.items()
        tried.add((rows, filled))

        def forward(input):
            clock[0] += 1.0 if filled else plain_seconds

        return forward

    monkeypatch.setattr(packing, "_forward", timed)
    monkeypatch.setattr(packing.time, "perf_counter", lambda: clock[0])
    packed = PackedLinears(nn.Linear(48, 80), min_elements=0, products=build_products())
    assert packed.few_rows == {(80, 48): {1: way, 2: 2 * way}}
    assert packed.leaves_single_rows_plain == (way == 0)
    assert tried == {(1, 0), (1, 1), (2, 0), (2, 2)}


@pytest.mark.parametrize("way", [0, 1])
def test_the_stats_say_which_way_single_rows_go(monkeypatch, way):
    monkeypatch.setitem(PackedLinears.__init__.__kwdefaults__, "min_elements", 0)
    monkeypatch.setattr(PackedLinears, "_cheapest_way", lambda self, shape, rows: rows * way)
    model = tiny_llama(dtype=torch.float32)
    assistant = make_assistant(model).compile()
    model.generate(PROMPT, assistant_model=assistant, max_new_tokens=4)
    assert assistant.stats.compiled and assistant.stats.single_rows_plain == (way == 0)
    model.generate(PROMPT, assistant_model=assistant, max_new_tokens=4, pack_weights=False)
    assert not assistant.stats.compiled and assistant.stats.single_rows_plain


def test_built_once(tmp_path):
    first = build_products(folder=tmp_path)
    assert first.seconds > 0 and first.path.parent == tmp_path
    again = build_products(folder=tmp_path)
    assert again.seconds == 0 and again.path == first.path
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


def test_what_cannot_be_built_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"compile\(\): got .*DEFAULT.* expected Linux on a processor with AVX2"):
        build_products("DEFAULT", tmp_path)
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(ValueError, match="expected a compiler that builds it. Name another one in .* CXX"):
        build_products(folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make_target", [tiny_llama, tiny_qwen3, tiny_gemma3])
def test_the_same_text(make_target, monkeypatch):
    """The oracle is mostly right, so whole trees are verified; every layer is packed, however small."""
    monkeypatch.setitem(PackedLinears.__init__.__kwdefaults__, "min_elements", 0)
    model = make_target(dtype=torch.float32)
    assistant = make_oracle(model)
    plain = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert assistant.compile() is assistant
    got = model.generate(PROMPT, assistant_model=assistant, max_new_tokens=24, do_sample=False, total_tokens=9)
    assert assistant.stats.compiled and assistant.stats.not_compiled_because is None
    assert assistant.stats.mean_accepted_length > 1.2
    assert torch.equal(got, plain)
    sampled = {"max_new_tokens": 24, "do_sample": True, "temperature": 1.3}
    torch.manual_seed(5)
    plain = model.generate(PROMPT, **sampled)
    torch.manual_seed(5)
    assert torch.equal(model.generate(PROMPT, assistant_model=assistant, **sampled), plain)


def test_undone(monkeypatch):
    model = tiny_llama(dtype=torch.float32)
    assistant = make_assistant(model)
    arguments = {"assistant_model": assistant, "max_new_tokens": 4}

    def reason():
        model.generate(PROMPT, **arguments)
        return assistant.stats.not_compiled_because

    assert "compile() was not called" in reason()
    assistant.compile()
    assert "65536 weights or more, only 57 smaller ones" in reason()
    arguments["pack_weights"] = False
    assert "not packed" in reason()
    assert "compile() was not called" in (assistant.compile(False), reason())[1]
    assistant.compile()
    assistant.detach()
    assert assistant.products is None


def test_float64_targets_say_why_not():
    model = tiny_llama()
    assistant = make_assistant(model).compile()
    plain = model.generate(PROMPT, max_new_tokens=8)
    assert torch.equal(model.generate(PROMPT, assistant_model=assistant, max_new_tokens=8), plain)
    assert not assistant.stats.compiled and "float64" in assistant.stats.not_compiled_because


def test_copies_and_pickles_start_without():
    model = tiny_llama(dtype=torch.float32)
    assistant = make_assistant(model).compile()
    model.generate(PROMPT, assistant_model=assistant, max_new_tokens=4)
    for other in (copy.deepcopy(assistant), pickle.loads(pickle.dumps(assistant))):
        assert other.products is None
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied.generate(PROMPT, max_new_tokens=4), model.generate(PROMPT, max_new_tokens=4))
