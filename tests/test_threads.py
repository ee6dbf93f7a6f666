"""Two threads that generate with one model and one assistant, each with a state of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import make_assistant
from tiny_models import tiny_llama

from confu_hf.acceleration.packing import PackedLinears
from confu_hf.acceleration.shared import holding, is_held
from confu_hf.compat import attention_implementation

PROMPTS = [torch.tensor([[5 + row, 17, 33, 8 + row, 61]]) for row in range(2)]


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["plain", "low rank"])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_call_in_the_middle_of_a_pass_of_another_one(options, passes):
    """In a thread of its own, from beginning to end while a layer of the other call waits for it."""
    model = tiny_llama()
    assistant = make_assistant(model, **options)
    lengths = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "max_new_tokens": 20}
    expected = [model.generate(prompt, **lengths).tolist() for prompt in PROMPTS]
    main, waiting, found = threading.get_ident(), [passes], []

    def interrupt(module, arguments):
        waiting[0] -= threading.get_ident() == main
        if waiting[0] == 0 and not found:
            found.append(None)
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(model.generate, PROMPTS[1], assistant_model=assistant, **lengths)
                found.append(call.result(timeout=60).tolist())

    hook = model.model.layers[3].register_forward_pre_hook(interrupt)
    text = model.generate(PROMPTS[0], assistant_model=assistant, **lengths).tolist()
    hook.remove()
    assert [text, found[1]] == expected
    assert attention_implementation(model.config) == model.config._attn_implementation == "sdpa"


def test_packed_layers_stay_until_the_last_call_is_over():
    layer = torch.nn.Linear(64, 64)
    packed = PackedLinears(layer, min_elements=1)
    with packed.active():
        with packed.active():
            assert "forward" in layer.__dict__
        assert "forward" in layer.__dict__
    assert "forward" not in layer.__dict__


def test_what_could_not_be_switched_on_is_not_held():
    class Owner:
        """Anything."""

    owner = Owner()
    with pytest.raises(ZeroDivisionError), holding(owner, lambda: 1 / 0, lambda: None):
        pass
    assert not is_held(owner)
