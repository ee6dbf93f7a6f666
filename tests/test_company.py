"""Targets as people have them: compiled, in training mode, offloaded, quantized, in half precision, with other attention."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from assisted_calls import DRAFT, PROMPT, assisted, plain
from oracles import make_oracle
from refusals import refused
from tiny_models import tiny_llama

from confu_hf import ConFuAssistant
from confu_hf.acceleration.packing import PackedLinears

SHORT = {"max_new_tokens": 8}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_target(in_place):
    """`torch.compile(model)`, or `model.compile()`: the assistant is attached to what is inside."""
    target = tiny_llama(num_hidden_layers=3)
    expected = plain(target, **SHORT)
    model = target
    if in_place:
        target.compile(backend="eager")
    else:
        model = torch.compile(target, backend="eager")
    confu = ConFuAssistant.from_target(model, **DRAFT)
    assert confu.target is target
    assert torch.equal(model.generate(PROMPT, assistant_model=confu, **SHORT), expected)
    assert confu.stats.rounds > 0 and confu.detach() is target


def test_modes_are_left_as_they_are(target, confu):
    expected = plain(target)
    for training in (True, False):
        target.train(training)
        confu.train(training)
        assert torch.equal(assisted(target, confu), expected)
        assert {module.training for module in target.modules()} == {training} and confu.training == training


def test_an_assistant_of_one_target_on_another(target, confu):
    """It would read the other's adapter, or none."""
    other = tiny_llama()
    message = ["No ConFu adapter is attached to the target: got one without a ConFu adapter"]
    own = ConFuAssistant.from_target(other, contemplate=False)
    refused(message, lambda: assisted(other, confu), other)
    own.detach()
    ConFuAssistant.from_target(other, **DRAFT)
    message = ["An assistant that is not attached to the target: got an active adapter", r"Call confu.attach\(model\)"]
    refused(message, lambda: assisted(other, confu), other)
    assert torch.equal(assisted(target, confu), plain(target))


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_tree(target, confu, name):
    """Chosen after the assistant was attached: refused before anything is computed."""
    target.config._attn_implementation_internal = name
    message = [f"got attn_implementation='{name}', expected one of", r'Call model.set_attn_implementation\("sdpa"\)']
    with pytest.raises(ValueError) as caught:
        assisted(target, confu)
    assert all(part.replace("\\", "") in " ".join(str(caught.value).split()) for part in message)
    target.set_attn_implementation("sdpa")
    assert torch.equal(assisted(target, confu), plain(target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_differs_at_ties_alone(dtype, seed):
    """The first token that differs from plain decoding's is as good as it, up to the rounding of such logits."""
    target = tiny_llama(dtype=dtype, seed=seed)
    confu = make_oracle(target)
    arguments = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    expected = target.generate(PROMPT, **arguments)
    got = target.generate(PROMPT, assistant_model=confu, **arguments)
    assert got.shape == expected.shape and confu.stats.mean_accepted_length > 1.3
    differ = (got != expected).nonzero()
    if len(differ) == 0:
        return
    first = int(differ[0, 1])
    logits = target(expected[:, :first]).logits[0, -1].float()
    chosen = logits[torch.stack([got[0, first], expected[0, first]])]
    # Eight layers of rounding, in units of the last place of the greatest logit.
    tie = 16 * torch.finfo(dtype).eps * float(logits.abs().max())
    assert float(logits.max() - chosen.min()) < tie < float(logits.max() - logits.median())


def offloaded(target, kind, folder):
    if kind == "cpu":
        return cpu_offload(target, execution_device="cpu")
    return disk_offload(target, folder, execution_device="cpu")


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_target(kind, tmp_path):
    """Its weights are on the meta device between passes; the assistant's are not."""
    expected = plain(tiny_llama(), **SHORT)
    pair = ConFuAssistant.from_target(tiny_llama(), **DRAFT)
    pair.save_pretrained(tmp_path / "pair")
    target = offloaded(tiny_llama(), kind, tmp_path / "weights")
    assert target.lm_head.weight.is_meta
    confu = ConFuAssistant.from_pretrained(tmp_path / "pair", target=target)
    assert confu.device.type == "cpu" and confu.dtype == torch.float64
    assert not any(parameter.is_meta for parameter in target.confu.parameters())
    assert torch.equal(assisted(target, confu, policy="fixed", **SHORT), expected)
    assert confu.stats.contemplate_tokens > 0 and len(PackedLinears(target, min_elements=0)) == 0
    assert confu.detach() is target and torch.equal(plain(target, **SHORT), expected)


def test_a_fresh_pair_for_an_offloaded_target():
    target = offloaded(tiny_llama(), "cpu", None)
    confu = ConFuAssistant.from_target(target, **DRAFT)
    assert confu.device.type == "cpu" and not any(parameter.is_meta for parameter in target.confu.parameters())
    assert torch.equal(assisted(target, confu, **SHORT), plain(tiny_llama(), **SHORT))


def test_a_target_quantized_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    target = tiny_llama(dtype=torch.float32)
    quantization.quantize_(target, quantization.Int8WeightOnlyConfig())
    assert type(target.lm_head.weight) is not torch.nn.Parameter
    confu = make_oracle(target)
    assert len(PackedLinears(target, min_elements=0)) == 0, "quantized layers compute as they do"
    assert torch.equal(assisted(target, confu, pack_weights=True), plain(target))
    assert confu.stats.mean_accepted_length > 1.3
