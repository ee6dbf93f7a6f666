"""EAGLE-3 drafts of other projects: read as they are, computed as their layer says, written so that others read them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from assisted_calls import PROMPT
from foreign_drafts import (
    CASES,
    DRAFT_VOCAB,
    EPS,
    FLAT,
    HEAD_DIM,
    HEADS,
    INTERMEDIATE,
    KV_HEADS,
    TARGET_WIDTH,
    save,
    tensors,
)
from safetensors.torch import load_file
from test_draft_variants import recomputed
from tiny_models import LAYER_IDS, VOCAB_SIZE, tiny_llama, tiny_target
from tiny_pairs import tiny_pair

from confu_hf import ConFuAssistant, ConFuConfig
from confu_hf.hub.conversion.formats import FORMATS, WRITABLE, find_format, write_eagle3
from confu_hf.hub.conversion.layer import ExportTarget
from confu_hf.hub.pair import read_pair
from confu_hf.training.pair import confu_from_eagle3

ROWS = 7


def expected_config(case) -> ConFuConfig:
    """What the checkpoint means, written down without the reader."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "target_hidden_size": TARGET_WIDTH,
        "target_num_hidden_layers": 8,
        "target_layer_ids": list(LAYER_IDS),
        "hidden_size": case.width,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 256,
        "draft_vocab_size": VOCAB_SIZE if case.whole else DRAFT_VOCAB,
        "contemplate": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return ConFuConfig(**{**fields, **case.expected})


def our_weights(case, weights: dict) -> dict:
    """The checkpoint's tensors by the names that the re-computation of the layer uses."""
    named = {name.replace(case.layer, "midlayer.", 1): tensor for name, tensor in weights.items()}
    return named | {"future_fc.weight": weights["fc.weight"]}


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_draft_computes_what_its_layer_says(name, tmp_path):
    case, target = CASES[name], tiny_llama()
    weights = tensors(case, target.get_input_embeddings().weight)
    confu = ConFuAssistant.from_pretrained(save(tmp_path, case.config, weights), target=target, **case.arguments)
    assert find_format(case.config).name == name.split("-")[0]
    expected = expected_config(case)
    known = {field: getattr(confu.config, field) for field in expected.to_dict() if field != "transformers_version"}
    for field, value in known.items():
        if not field.startswith(("_", "dtype", "architectures")):
            assert value == getattr(expected, field), field

    torch.manual_seed(0)
    features = torch.randn(ROWS, confu.config.num_features * TARGET_WIDTH, dtype=torch.float64)
    tokens, positions = torch.randint(VOCAB_SIZE, (1, ROWS)), torch.arange(5, 5 + ROWS)
    own = weights.get("embed_tokens.weight", target.get_input_embeddings().weight)
    named = our_weights(case, weights)
    states, logits, _ = recomputed(named, expected, own[tokens[0]], features, features, positions)
    with torch.no_grad():
        embeds = confu.input_embeddings(target.get_input_embeddings())(tokens)
        mask = torch.ones(ROWS, ROWS).tril().bool()[None, None]
        got = confu(embeds, confu.fuse(features)[None], positions[None], attention_mask=mask)
        torch.testing.assert_close(got[0], states, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(confu.logits(got)[0], logits, rtol=1e-6, atol=1e-6)
    plain = target.generate(PROMPT, max_new_tokens=16)
    assert torch.equal(target.generate(PROMPT, max_new_tokens=16, assistant_model=confu), plain)
    assert confu.stats.rounds > 0


@pytest.mark.parametrize("name", ["safeailab", "specforge", "speculators-3.1", "modelopt"])
def test_a_converted_draft_is_a_pair_like_any_other(name, tmp_path, monkeypatch):
    """Written by the script in our form, it loads without its target, and starts ConFu's training."""
    case, target = CASES[name], tiny_llama(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    weights = tensors(case, target.get_input_embeddings().weight)
    save(tmp_path / "theirs", case.config, weights, pickled=True)
    script = load_script(monkeypatch)
    arguments = ["--input", str(tmp_path / "theirs"), "--target", str(tmp_path / "target")]
    script.main([*arguments, "--output", str(tmp_path / "ours")])
    loaded = ConFuAssistant.from_pretrained(tmp_path / "ours", dtype="auto")
    for theirs, tensor in our_weights(case, weights).items():
        if not theirs.startswith("future"):
            assert torch.equal(loaded.state_dict()[theirs], tensor)

    draft = confu_from_eagle3(ConFuAssistant, loaded)
    assert draft.config.contemplate and torch.equal(draft.fc.weight, loaded.fc.weight.to(draft.dtype))


def load_script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    monkeypatch.delitem(sys.modules, "convert", raising=False)
    return importlib.import_module("convert")


WRITTEN = {
    "safeailab": [{}, {"hidden_size": 16}, {"draft_vocab_size": VOCAB_SIZE}],
    "specforge": [
        {},
        {"hidden_size": 16, "fc_norm": True},
        {"target_layer_ids": [1, 3, 6], "norm_before_residual": True, "feedback_after_norm": True},
        {"norm_before_fc": True, "attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
    "speculators": [
        {},
        {"qk_norm": True, "fc_norm": True, "feedback_after_norm": True, "target_layer_ids": [1, 6]},
        {"draft_vocab_size": VOCAB_SIZE, "own_embeddings": True, "norm_before_residual": True},
    ],
}


@pytest.mark.parametrize("contemplate", [False, True])
@pytest.mark.parametrize(
    ("name", "variant"), [(name, index) for name, variants in WRITTEN.items() for index in range(len(variants))]
)
def test_what_is_written_is_read_again(name, variant, contemplate, tmp_path):
    """All of the EAGLE-3 part, and nothing of the contemplation."""
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=contemplate, **WRITTEN[name][variant])
    write_eagle3(tmp_path, draft, name, ExportTarget.of(target))
    assert not any("future" in key for key in load_file(tmp_path / "model.safetensors"))
    again = read_pair(tmp_path, target=target)
    state = {key: tensor for key, tensor in draft.state_dict().items() if not key.startswith("future_")}
    assert again.weights.keys() == state.keys()
    assert all(torch.equal(again.weights[key], state[key]) for key in state)
    fields = {**draft.config.to_dict(), "contemplate": False}
    for key in ("architectures", "dtype", "transformers_version", "initializer_range"):
        fields.pop(key, None)
    assert {key: again.config.to_dict().get(key) for key in fields} == fields


def test_every_format_is_told_from_the_others():
    assert set(WRITABLE) == set(WRITTEN) == {layout.name for layout in FORMATS} - {"modelopt"}
    assert find_format({"model_type": "llama"}) is None and find_format({}) is None


def test_the_written_forms_are_those_of_their_projects(tmp_path):
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=False, target_layer_ids=[1, 3, 6])
    write_eagle3(tmp_path / "specforge", draft, "specforge")
    config = json.loads((tmp_path / "specforge" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6], "vLLM: by the state that enters"
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5], "SGLang: by the state that leaves"
    layer = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"}
    layer |= {"mlp.up_proj", "mlp.down_proj", "input_layernorm", "hidden_norm", "post_attention_layernorm"}
    outside = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    keys = load_file(tmp_path / "specforge" / "model.safetensors").keys()
    assert keys == {f"midlayer.{name}.weight" for name in layer} | outside

    write_eagle3(tmp_path / "speculators", draft, "speculators", ExportTarget.of(target, "org/target"))
    config = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and config["transformer_layer_config"]["hidden_size"] == 32
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6] and config["norm_before_residual"] is False
    keys = load_file(tmp_path / "speculators" / "model.safetensors").keys()
    assert keys == {f"layers.0.{name}.weight" for name in layer} | outside | {"embed_tokens.weight"}
    verifier = {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["verifier"] == verifier


def refused(message: str, call) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    text = " ".join(str(caught.value).split())
    assert re.search(message, text), f"{message!r} is not in: {text}"


IDS = "eagle_aux_hidden_state_layer_ids"
REFUSALS = {
    "other key": (
        "safeailab",
        {},
        lambda w: w.update({"midlayer.gate.weight": w["norm.weight"] + 1}),
        "unexpected keys: .*midlayer.gate",
    ),
    "missing key": ("specforge", {}, lambda w: w.pop("norm.weight"), r"missing keys: \['norm.weight'\]"),
    "other shape": ("modelopt", {"hidden_size": 16}, None, "mismatched keys: "),
    "layers": (
        "safeailab",
        {},
        lambda w: w.update({"layers.0.a": w["norm.weight"] + 1, "layers.1.a": w["norm.weight"] + 0}),
        "2 decoder layers",
    ),
    "layer ids": (
        "specforge",
        {"eagle_config": {IDS: [1, 3, 7]}},
        None,
        r"target_layer_ids=\[2, 4, 8\] for a target of 8",
    ),
    "two ways": (
        "specforge",
        {IDS: [2, 4, 5], "eagle_config": {IDS: [2, 4, 5]}},
        None,
        r"expected \[1, 3, 4\] in eagle_config",
    ),
    "no norm": ("specforge", {"norm_output": False}, None, "norm_output=False, expected a norm before the LM head"),
    "which norm": (
        "specforge",
        {"norm_output": True},
        None,
        "does not tell feedback_after_norm.*Pass `feedback_after_norm=True`",
    ),
    "residual": ("speculators", {"norm_before_residual": None}, None, "does not tell norm_before_residual"),
    "other norm": (
        "modelopt",
        {"eagle_config": {"use_last_layernorm": False}},
        None,
        "use_last_layernorm=False, expected True",
    ),
    "both norms": (
        "specforge",
        {"fc_norm": True, "norm_before_fc": True},
        None,
        "fc_norm=True and norm_before_fc=True",
    ),
    "norm without weights": ("specforge", {"fc_norm": True}, None, "missing keys: .*fc_norm.0.weight"),
    "mtp": (
        "modelopt",
        {"eagle_config": {"use_last_layernorm": True, "use_mtp_layernorm": True}},
        None,
        "use_mtp_layernorm",
    ),
    "parallel": (
        "modelopt",
        {"eagle_config": {"use_last_layernorm": True, "parallel_draft_step": 4}},
        None,
        "parallel_draft_step=4",
    ),
    "no features": (
        "specforge",
        {"eagle_config": {"use_aux_hidden_state": False}},
        None,
        "use_aux_hidden_state=False",
    ),
    "algorithm": (
        "speculators",
        {"speculators_model_type": "dflash"},
        None,
        "speculators_model_type='dflash', expected 'eagle3'",
    ),
    "rope": (
        "safeailab",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        None,
        "a rope_type out of default, linear",
    ),
    "kind": ("safeailab", {"model_type": "nonesuch"}, None, "a config that cannot be read"),
    "no map": ("modelopt", {}, lambda w: w.pop("d2t"), "no d2t, and draft_vocab_size=61 of vocab_size=97"),
    "maps": ("specforge", {}, lambda w: w["t2d"].logical_not_(), "a t2d that marks other tokens than d2t names"),
    "map": ("specforge", {}, lambda w: w["d2t"].add_(50), "token ids from"),
    "vocabulary": ("safeailab", {"vocab_size": 101}, None, "a t2d that marks other tokens"),
    "nan": ("safeailab", {}, lambda w: w["norm.weight"].fill_(float("nan")), "NaN or infinite weights"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(what, tmp_path):
    name, changes, damage, message = REFUSALS[what]
    target = tiny_llama()
    config = {key: value for key, value in {**CASES[name].config, **changes}.items() if value is not None}
    weights = tensors(CASES[name], target.get_input_embeddings().weight)
    if damage is not None:
        damage(weights)
    save(tmp_path, config, weights)
    refused(message, lambda: ConFuAssistant.from_pretrained(tmp_path, target=target))
    assert type(target) is type(tiny_llama()), "untouched"


def test_a_foreign_draft_needs_its_target(tmp_path):
    save(tmp_path, CASES["safeailab"].config, tensors(CASES["safeailab"], None))
    refused("got no target, expected the model that it drafts for", lambda: ConFuAssistant.from_pretrained(tmp_path))

    other = ConFuConfig()
    refused(
        "got a config beside it", lambda: ConFuAssistant.from_pretrained(tmp_path, target=tiny_llama(), config=other)
    )


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_read_for_those_who_say_so(tmp_path):
    target = tiny_llama()
    weights = tensors(CASES["safeailab"], None)
    save(tmp_path / "a", CASES["safeailab"].config, weights, pickled=True)
    load = ConFuAssistant.from_pretrained
    refused("pickled weights only .*pytorch_model.bin.*allow_pickle=True", lambda: load(tmp_path / "a", target=target))
    confu = load(tmp_path / "a", target=target, allow_pickle=True)
    assert torch.equal(confu.fc.weight, weights["fc.weight"])
    confu.detach()
    planted = {**weights, "more": Planted(tmp_path / "planted")}
    save(tmp_path / "b", CASES["safeailab"].config, planted, pickled=True)
    refused("no plain state dict", lambda: load(tmp_path / "b", target=target, allow_pickle=True))
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("safeailab", {"fc_norm": True}, "fc_norm=True, expected False"),
        ("safeailab", {"target_layer_ids": [1, 2, 3]}, r"target_layer_ids=\[1, 2, 3\], expected \[2, 4, 5\]"),
        ("specforge", {"qk_norm": True}, "qk_norm=True, expected False"),
        ("speculators", {"hidden_size": 16}, "hidden_size=16, expected 32"),
    ],
)
def test_what_a_format_has_no_place_for_is_not_written(name, fields, message, tmp_path):
    draft = tiny_pair(tiny_llama(), contemplate=False, **fields)
    refused(message, lambda: write_eagle3(tmp_path / "no", draft, name))
    assert not (tmp_path / "no").exists()
    plain = tiny_pair(tiny_llama(), contemplate=False)
    refused("no embeddings of its target", lambda: write_eagle3(tmp_path / "no", plain, "speculators"))
    refused("got nonesuch, expected one of", lambda: write_eagle3(tmp_path / "no", draft, "nonesuch"))


def test_a_draft_of_the_published_geometry_of_llama_3_1_8b(tmp_path):
    """32 layers, 32 and 8 heads, 128,256 tokens of which the draft has 32,000: all but the widths."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    heads = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 4,
        "hidden_size": 64,
        "vocab_size": 128256,
    }
    target = tiny_target(
        "llama", dtype=torch.float32, num_hidden_layers=32, rope_parameters=rope, eos_token_id=128009, **heads
    )
    draft_config = ConFuConfig.from_target_config(target.config, draft_vocab_size=32000, contemplate=False)
    made = ConFuAssistant(draft_config)
    made.set_draft_vocabulary(torch.randperm(128256)[:32000])
    weights = {key: tensor for key, tensor in made.state_dict().items()}
    config = {**FLAT, **heads, "intermediate_size": draft_config.intermediate_size, "draft_vocab_size": 32000}
    save(tmp_path, {**config, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}, weights)

    confu = ConFuAssistant.from_pretrained(tmp_path, target=target)
    prompt = torch.tensor([[128000, 9906, 1917]])
    out = target.generate(prompt, assistant_model=confu, max_new_tokens=8)

    assert confu.config.target_layer_ids == [2, 16, 29] and confu.config.rope_theta == 10000.0
    assert torch.equal(out, target.generate(prompt, max_new_tokens=8)) and confu.stats.rounds > 0
