"""Gated LoRA: what contemplate tokens compute with other weights, while every other row computes as before."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import ARCHITECTURES, NUM_LAYERS, tiny_llama
from tiny_pairs import tiny_pair
from torch import nn
from transformers import DynamicCache

from confu_hf import ConFuAdapterConfig, ConFuAssistant
from confu_hf.acceleration.packing import PackedLinears
from confu_hf.adapter.files import load_adapter_folder
from confu_hf.compat import cache_keyword
from confu_hf.decoding.contemplation import Contemplator
from confu_hf.target.cache import TreeCache
from confu_hf.target.context import ContemplateContext
from confu_hf.target.passes import contemplate_anchors, prefill, verify
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.layout import verify_layout

IDS, PROMPT = [2, 4, 5], torch.tensor([[5, 17, 40, 8, 9]])


def low_rank_pair(architecture: str = "llama", **fields):
    """A pair whose contemplate tokens compute with visibly other weights."""
    target = ARCHITECTURES[architecture](**fields)
    confu = tiny_pair(target, lora_rank=2, lora_alpha=3.0)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name in ("confu_lora_down", "confu_lora_up"):
            nn.init.normal_(getattr(target.confu, name)[target.confu.current].weight, std=0.3)
    return target, confu


def contemplator(target) -> Contemplator:
    return Contemplator(target, target.confu, target.confu.current, IDS)


@torch.no_grad()
def verified(target, act: bool):
    """A small tree with two contemplate tokens."""
    tokens = torch.tensor([[7, 11, 12, 13]])
    tree = DraftTree(tokens, torch.tensor([[-1, 0, 0, 1]]), torch.tensor([[0, 1, 1, 2]]), torch.zeros(1, 4))
    who = contemplator(target)
    cache = TreeCache(NUM_LAYERS, who.soft_prompts())
    features = prefill(target, PROMPT, cache, IDS).features
    layout = verify_layout(
        tree,
        torch.tensor([[1, 3]]),
        slot_position_ids=torch.arange(5)[None],
        soft_prompt_length=cache.soft_prompt_length,
    )
    with who.acting(2 if act else 0):
        return verify(target, layout, who.embedding(features[:, -1]), cache, IDS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_ordinary_rows_are_bit_identical(architecture):
    target, _ = low_rank_pair(architecture)
    plain, changed = verified(target, False), verified(target, True)
    assert torch.equal(plain.logits, changed.logits) and torch.equal(plain.features, changed.features)
    assert ((plain.futures - changed.futures).abs().amax(-1) > 1e-3).all()  # of both contemplate tokens


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_contemplate_tokens_compute_as_with_merged_weights(architecture):
    """The plain reference: a copy of the target with W + (alpha / r) B A, on the cache of the original."""
    target, _ = low_rank_pair(architecture)
    cache = DynamicCache()
    with torch.no_grad():
        target(PROMPT, **cache_keyword(target, cache))
    features, positions = torch.randn(1, 96, dtype=torch.float64), torch.tensor([[1, 3, 4]])
    with torch.no_grad():
        got = contemplator(target).anchors(contemplator(target).context(cache), features, positions)
        merged = copy.deepcopy(target)
        for module, product in merged.confu.low_rank(merged).parts:
            module.weight.add_(1.5 * product.up @ product.down)
        who = contemplator(merged)
        who.low_rank = None
        expected = who.anchors(who.context(cache), features, positions)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gradients_reach_it_and_nothing_of_the_target():
    target, _ = low_rank_pair()
    target.requires_grad_(False)
    parts = [getattr(target.confu, name)[target.confu.current].weight for name in ("confu_lora_down", "confu_lora_up")]
    for weight in parts:
        weight.requires_grad_(True)
    cache = DynamicCache()
    target(PROMPT, **cache_keyword(target, cache))
    with target.confu.low_rank(target).acting():
        futures, _ = contemplate_anchors(
            target,
            ContemplateContext(cache),
            torch.randn(1, 2, 32, dtype=torch.float64),
            torch.tensor([[2, 4]]),
            torch.ones(1, 2, 5, dtype=torch.bool),
            IDS,
        )
    futures.sum().backward()
    for weight in parts:  # of the layers below the highest feature
        assert (weight.grad[: IDS[-1]].abs().amax((1, 2)) > 0).all() and not weight.grad[IDS[-1] :].any()


def test_it_starts_as_no_change_and_costs_nothing_when_off():
    target = tiny_llama()
    tiny_pair(target, lora_rank=2)
    up = target.confu.adapter_weights(target.confu.current)["confu_lora_up"]
    assert not up.any()
    plain, changed = verified(target, False), verified(target, True)
    torch.testing.assert_close(plain.futures, changed.futures, rtol=0, atol=1e-12)
    other = tiny_llama()
    tiny_pair(other)
    assert other.confu.low_rank(other) is None
    assert not any("lora" in name for name in other.state_dict())


def test_no_hook_stays():
    target, confu = low_rank_pair()

    def hooks() -> list[str]:
        return [name for name, module in target.named_modules() if name.endswith("proj") and module._forward_hooks]

    with pytest.raises(RuntimeError, match="on purpose"), target.confu.low_rank(target).acting(1):
        assert len(hooks()) == 7 * NUM_LAYERS
        raise RuntimeError("on purpose")
    assert not hooks()
    before = tiny_llama()(PROMPT).logits
    assert torch.equal(target(PROMPT).logits, before)
    target.generate(PROMPT, assistant_model=confu, max_new_tokens=8)
    assert not hooks() and torch.equal(target(PROMPT).logits, before)
    assert torch.equal(confu.detach()(PROMPT).logits, before)


@pytest.mark.parametrize("do_sample", [False, True])
def test_texts_stay_what_they_are(do_sample):
    target, confu = low_rank_pair()
    rules = {"max_new_tokens": 16, "do_sample": do_sample, "eos_token_id": None}
    torch.manual_seed(1)
    plain = tiny_llama().generate(PROMPT, **rules)
    torch.manual_seed(1)
    assert torch.equal(target.generate(PROMPT, assistant_model=confu, policy="fixed", **rules), plain)
    assert confu.stats.contemplate_tokens > 0


def test_with_packed_weights():
    target, _ = low_rank_pair(dtype=torch.float32)
    plain = verified(target, True)
    with PackedLinears(target, min_elements=0).active():
        packed = verified(target, True)
    torch.testing.assert_close(packed.futures, plain.futures, rtol=1e-4, atol=1e-4)


def test_saved_loaded_and_copied(tmp_path):
    target, confu = low_rank_pair()
    weights, futures = target.confu.adapter_weights("contemplate"), verified(target, True).futures
    assert len(weights) == 5
    assert torch.equal(verified(copy.deepcopy(target), True).futures, futures)
    confu.save_pretrained(tmp_path)
    config, loaded = load_adapter_folder(tmp_path / "adapter")
    assert (
        config.lora_rank == 2 and config.lora_widths["mlp.down_proj"] == [48, 32] and loaded.keys() == weights.keys()
    )
    other = tiny_llama()
    ConFuAssistant.from_pretrained(tmp_path, target=other)
    through_peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").get_base_model()
    for again in (other, through_peft):
        torch.testing.assert_close(verified(again, True).futures, futures, rtol=1e-12, atol=1e-12)


def test_by_get_peft_model_with_chosen_projections():
    config = ConFuAdapterConfig(lora_rank=3, lora_target_modules=["o_proj"])
    target = get_peft_model(tiny_llama(), config).get_base_model()
    assert config.lora_widths == {"self_attn.o_proj": [32, 32]} and config.lora_scale == 16
    weights = target.confu.adapter_weights("default")
    assert weights["confu_lora_down"].shape == (8, 3, 32) and weights["confu_lora_up"].shape == (8, 32, 3)
    assert {name for name, p in target.named_parameters() if p.requires_grad} == {
        f"confu.{name}.default.weight" for name in weights
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": -1}, "got lora_rank=-1, expected an integer of at least 0"),
        ({"lora_rank": 2, "lora_alpha": 0}, "got lora_alpha=0, expected a number above 0"),
        (
            {"lora_rank": 2, "lora_target_modules": ["qkv"]},
            r"got \['qkv'\], which this LlamaForCausalLM does not have",
        ),
        (
            {"lora_rank": 2, "lora_widths": {"self_attn.q_proj": [32, 48]}},
            "made for another target: got lora_widths=.*48.*, expected",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    target = tiny_llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(target, ConFuAdapterConfig(**fields))
    assert not hasattr(target, "confu")
