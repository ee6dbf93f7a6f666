"""A pair on disk: complete and as it was written, or refused; nothing in between."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from assisted_calls import DRAFT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from refusals import refused, rewrite
from safetensors.torch import load_file
from tiny_models import tiny_llama

from confu_hf import ConFuAdapterConfig, ConFuAssistant
from confu_hf.adapter.checksum import CHECKSUM, weights_checksum
from confu_hf.hub.pair import read_pair, write_pair
from confu_hf.modeling_confu import ConFuDraftModel

DRAFT_FILE, ADAPTER_FILE = "model.safetensors", "adapter/adapter_model.safetensors"
CONFIGS = {DRAFT_FILE: "config.json", ADAPTER_FILE: "adapter/adapter_config.json"}
KEY = "base_model.model.confu.confu_experts.weight"


def edit_json(path, **changes):
    """Fields of a JSON file; None removes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def flip(path, position: int, mask: int = 1):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt(path):
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [truncate, corrupt])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_target", [True, False])
def test_damaged_files(folder, damage, name, with_target):
    damage(folder / name)
    target = tiny_llama()
    message = [
        f"{folder}.*got a corrupted or truncated file",
        "expected a complete safetensors file",
        "download it again",
    ]
    kwargs = {"target": target} if with_target else {}
    refused(message, lambda: ConFuAssistant.from_pretrained(folder, **kwargs), target)
    assert not hasattr(target, "confu") and type(target) is type(tiny_llama())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "got .* expected config.json and model.safetensors among them. Pass the folder"),
        ("model.safetensors", "got .* expected config.json and model.safetensors among them. Pass the folder"),
        ("adapter/adapter_config.json", "got no adapter/ with adapter_config.json and adapter_model.safetensors"),
        (
            "adapter/adapter_model.safetensors",
            "got no adapter/ with adapter_config.json and adapter_model.safetensors",
        ),
    ],
)
def test_missing_files(folder, name, message):
    (folder / name).unlink()
    target = tiny_llama()
    call = lambda: ConFuAssistant.from_pretrained(folder, target=target)  # noqa: E731
    refused([message], call, target, error=FileNotFoundError)
    if name.startswith("adapter"):
        assert ConFuAssistant.from_pretrained(folder)._adapter is None, "without a target, the adapter may come later"


def test_missing_folder(target):
    call = lambda: ConFuAssistant.from_pretrained("/nowhere/at/all", target=target)  # noqa: E731
    refused(["/nowhere/at/all"], call, target, error=OSError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["fc.weight"].fill_(float("nan")), "`fc.weight` .* got NaN or infinite weights, expected finite"),
        (lambda w: w.pop("fc.weight"), r"got missing keys: \['fc.weight'\], expected exactly"),
        (lambda w: w.update(other=torch.zeros(1)), r"got unexpected keys: \['other'\], expected exactly"),
    ],
)
def test_draft_weights(folder, change, message):
    rewrite(folder / "model.safetensors", change)
    target = tiny_llama()
    refused([message, "ownload it again"], lambda: ConFuAssistant.from_pretrained(folder, target=target), target)


def test_nan_in_the_adapter_file(folder):
    key = "base_model.model.confu.confu_experts.weight"
    rewrite(folder / "adapter" / "adapter_model.safetensors", lambda w: w[key].fill_(float("inf")))
    target = tiny_llama()
    message = [
        "`confu_experts` of .*got NaN or infinite weights, expected finite numbers",
        "Download the adapter again",
    ]
    refused(message, lambda: ConFuAssistant.from_pretrained(folder, target=target), target)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_checksum_is_of_the_file(folder, name):
    tensors = load_file(folder / name)
    checksum = weights_checksum(tensors)
    assert json.loads((folder / CONFIGS[name]).read_text())[CHECKSUM] == checksum
    first = max(tensors, key=lambda name: tensors[name].ndim)
    assert weights_checksum({**tensors, first: tensors[first].clone().reshape(-1)}) != checksum, "shapes count"
    assert weights_checksum({**tensors, first: tensors[first].view(torch.int64)}) != checksum, "dtypes count"
    tensors["other"] = tensors.pop(first)
    assert weights_checksum(tensors) != checksum, "names count"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_flipped_bit_is_refused(folder, name, dtype):
    flip(folder / name, -8)  # the lowest bit of the last float64
    target = tiny_llama()
    message = [
        r"The weights in .*: got the checksum \w{64}, expected \w{64}, the weights_sha256 of their",
        "Download both",
    ]
    load = functools.partial(ConFuAssistant.from_pretrained, folder, **({"dtype": dtype} if dtype else {}))
    refused(message, load, target)
    refused(message, lambda: load(target=target), target)
    assert not hasattr(target, "confu") and type(target) is type(tiny_llama())
    if name == ADAPTER_FILE:
        refused(message, lambda: PeftModel.from_pretrained(target, folder / "adapter"), target)


def test_files_without_a_checksum_load_as_before(folder, confu):
    for name in CONFIGS.values():
        edit_json(folder / name, **{CHECKSUM: None})
    for name in CONFIGS:
        flip(folder / name, -8)
    loaded = ConFuAssistant.from_pretrained(folder, target=tiny_llama())
    assert loaded.config.to_diff_dict() == confu.config.to_diff_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_is_no_damage(folder, tmp_path, dtype):
    target = tiny_llama(dtype=dtype)
    confu = ConFuAssistant.from_pretrained(folder, target=target)
    PeftModel.from_pretrained(tiny_llama(dtype=dtype), folder / "adapter", low_cpu_mem_usage=True)
    confu.save_pretrained(tmp_path / "other")
    again = ConFuAssistant.from_pretrained(tmp_path / "other", target=tiny_llama(dtype=torch.float64))
    assert torch.equal(again.fc.weight, confu.fc.weight.double())


def test_changed_weights_get_a_checksum_of_their_own(folder):
    """Also over the folder that they came from: nothing of it is still read."""
    target, other = tiny_llama(), tiny_llama()
    confu = ConFuAssistant.from_pretrained(folder, target=target)
    assert not hasattr(confu.config, CHECKSUM)
    with torch.no_grad():
        confu.fc.weight.add_(1)
        target.confu.confu_experts["contemplate"].weight.add_(1)
    confu.save_pretrained(folder)
    again = ConFuAssistant.from_pretrained(folder, target=other)
    assert torch.equal(again.fc.weight, confu.fc.weight)
    experts = [model.confu.adapter_weights("contemplate")["confu_experts"] for model in (target, other)]
    assert torch.equal(*experts)


def test_what_was_read_does_not_hang_on_the_file(folder, confu):
    loaded = ConFuAssistant.from_pretrained(folder, dtype="auto")
    for name in CONFIGS:
        with open(folder / name, "r+b") as file:
            file.write(b"\xff" * (folder / name).stat().st_size)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in confu.state_dict().items())
    loaded.attach(tiny_llama())


def test_what_peft_saves_carries_no_checksum_of_another_file(folder, tmp_path):
    config = PeftConfig.from_pretrained(folder / "adapter")
    assert isinstance(config, ConFuAdapterConfig) and config.weights_sha256
    fresh = get_peft_model(tiny_llama(), config)
    torch.nn.init.normal_(fresh.get_base_model().confu.confu_experts["default"].weight)
    trained = PeftModel.from_pretrained(tiny_llama(), folder / "adapter", is_trainable=True)
    for number, model in enumerate((trained, PeftModel.from_pretrained(tiny_llama(), folder / "adapter"))):
        with torch.no_grad():
            model.get_base_model().confu.confu_experts["default"].weight.add_(1)
        model.save_pretrained(tmp_path / str(number))
        assert CHECKSUM not in json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        model.load_adapter(tmp_path / str(number), "default")
        PeftModel.from_pretrained(tiny_llama(), tmp_path / str(number))


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(
    "damaged",
    [
        "base_model.model.confu.konfu_experts.weight",
        "base_model.model.konfu.confu_experts.weight",
        "base_mode1.model.confu.confu_experts.weight",
        "base_model.model.confu.confu_experts.weigh_",
        "base_model.model.confu.confu_router.confu_experts.weight",
    ],
)
def test_a_damaged_name_in_the_adapter(folder, damaged, checksum):
    rewrite(folder / ADAPTER_FILE, lambda weights: weights.update({damaged: weights.pop(KEY)}))
    if not checksum:
        edit_json(folder / CONFIGS[ADAPTER_FILE], **{CHECKSUM: None})
    target = tiny_llama()
    message = [rf"got \['{damaged}', .*expected \['confu_experts', 'confu_prompts', 'confu_router'\]. Download the"]
    refused(message, lambda: ConFuAssistant.from_pretrained(folder, target=target), target)
    refused(message, lambda: PeftModel.from_pretrained(target, folder / "adapter"), target)


def test_several_files(folder, confu, tmp_path):
    confu.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 1
    loaded = ConFuAssistant.from_pretrained(tmp_path / "many", target=tiny_llama())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in confu.state_dict().items())
    flip(tmp_path / "many" / names[0], -8)
    with pytest.raises(ValueError, match="got the checksum"):
        read_pair(tmp_path / "many")
    (tmp_path / "many" / names[0]).unlink()
    with pytest.raises(OSError, match=names[0]):
        read_pair(tmp_path / "many")


def test_a_checkpoint_of_another_kind(folder):
    edit_json(folder / "config.json", model_type="llama", draft_vocab_size=None)
    message = [
        "got model_type 'llama', expected 'confu', or an EAGLE-3 draft of .*. Pass a ConFu pair or such a draft"
    ]
    refused(message, lambda: ConFuAssistant.from_pretrained(folder), tiny_llama())


def test_a_config_that_no_draft_can_be_built_from(folder):
    edit_json(folder / "config.json", intermediate_size=4.5)
    message = ["got fields that no draft can be built from .*, expected the config of a ConFu draft"]
    refused(message, lambda: ConFuAssistant.from_pretrained(folder), tiny_llama())


def test_a_bare_draft_is_written_and_read(confu, tmp_path):
    """As converters do: without an assistant, without a target."""
    draft = ConFuDraftModel(confu.config)
    draft.load_state_dict(confu.state_dict())
    write_pair(tmp_path, draft, confu._loose_adapter())
    pair = read_pair(tmp_path, revision=None, dtype="auto", attention_bias=False, bos_token_id=7)
    assert pair.arguments == {"dtype": "auto"} and pair.config.bos_token_id == 7
    assert pair.generation_config.contemplate
    assert all(torch.equal(value, pair.weights[name]) for name, value in draft.state_dict().items())
    assert all(
        torch.equal(value, pair.adapter.weights[name]) for name, value in confu._loose_adapter().weights.items()
    )
    assert ConFuAssistant.from_pretrained(tmp_path, target=tiny_llama()).fc.weight.isfinite().all()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder to damage and what is in it."""
    path = tmp_path_factory.mktemp("pristine") / "pair"
    ConFuAssistant.from_target(tiny_llama(), **DRAFT).save_pretrained(path)
    return path, read_pair(path)


FILES = [*CONFIGS, *CONFIGS.values(), "generation_config.json"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), head=st.booleans()
)
def test_a_damaged_byte_never_gives_other_weights(pristine, tmp_path, name, where, mask, head):
    """Refused, or every weight is bit for bit what was saved; the names and numbers in front of a file count too."""
    whole, expected = pristine
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    size = (folder / name).stat().st_size
    flip(folder / name, int(where * (min(size, 600) if head else size)), mask)
    try:
        pair = read_pair(folder)
        confu = ConFuAssistant.from_pretrained(folder)
    except (ValueError, OSError):
        return
    for weights, saved in ((pair.weights, expected.weights), (pair.adapter.weights, expected.adapter.weights)):
        assert weights.keys() == saved.keys()
        assert all(torch.equal(bits(weights[key]), bits(saved[key])) for key in saved)
    assert all(torch.equal(bits(value), bits(expected.weights[key])) for key, value in confu.state_dict().items())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
