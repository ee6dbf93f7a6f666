"""Targets that see: an image in the prompt, then the text of plain `generate`."""

from __future__ import annotations

import pytest
import torch
from oracles import KnownTextAssistant, make_assistant
from tiny_vision import IMAGE, VISION

from confu_hf.compat import OUTPUT_CACHE, cache_keyword

TREE = {"total_tokens": 6, "depth": 3, "draft_top_k": 3}
ARGUMENTS = {"pad_token_id": 0, "eos_token_id": 96, "max_new_tokens": 14}


def first_row(prompts):
    """The longer prompt alone."""
    share = len(prompts["input_ids"])
    return {name: value[: len(value) // share] for name, value in prompts.items()}


@pytest.mark.parametrize("name", VISION)
def test_same_text_as_plain_generate(name):
    """A padded batch with an image in each row, greedy; one row, sampled."""
    model, prompts = VISION[name].model(), VISION[name].prompts()
    with torch.no_grad():
        seen = model(**prompts).logits
        other = model(**{**prompts, "pixel_values": torch.randn_like(prompts["pixel_values"])}).logits
    assert not torch.allclose(seen[:, -1], other[:, -1]), "the image matters"
    expected = model.generate(**prompts, do_sample=False, **ARGUMENTS)
    assistant = make_assistant(model, KnownTextAssistant)
    assistant.texts = [row[row != 0].tolist() for row in expected]
    got = model.generate(**prompts, do_sample=False, assistant_model=assistant, **TREE, **ARGUMENTS)
    assert got.tolist() == expected.tolist()
    assert assistant.stats.mean_accepted_length > 1.5
    texts = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        torch.manual_seed(5)
        texts.append(model.generate(**first_row(prompts), do_sample=True, **more, **ARGUMENTS).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", VISION)
def test_a_prompt_without_an_image(name):
    model = VISION[name].model()
    prompt = torch.tensor([[5, 7, 9, 11, 13]])
    expected = model.generate(prompt, do_sample=False, **ARGUMENTS)
    got = model.generate(prompt, do_sample=False, assistant_model=make_assistant(model), **TREE, **ARGUMENTS)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["Qwen2-VL", "SmolVLM"])
def test_a_second_turn_on_the_cache_of_an_image(name):
    """The image is in the cache: the next turn brings ids alone, and goes on from the first one's positions."""
    model, prompts = VISION[name].model(), first_row(VISION[name].prompts())
    assistant = make_assistant(model)
    texts = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        first = model.generate(**prompts, do_sample=False, return_dict_in_generate=True, **more, **ARGUMENTS)
        longer = torch.cat([first.sequences, torch.tensor([[44, 8, 15]])], dim=1)
        cache = cache_keyword(model, first[OUTPUT_CACHE])
        texts.append(model.generate(longer, do_sample=False, **cache, **more, **ARGUMENTS).tolist())
    assert texts[0] == texts[1]


def test_a_prompt_that_ends_with_an_image_in_several_dimensions_is_refused():
    model, prompts = VISION["Qwen2-VL"].model(), first_row(VISION["Qwen2-VL"].prompts())
    end = int((prompts["input_ids"][0] == IMAGE).nonzero()[-2]) + 1  # within it: its last token stands as far as text
    cut = {name: value[:, :end] for name, value in prompts.items() if value.shape == prompts["input_ids"].shape}
    positions = torch.arange(end).expand(3, 1, -1).clone()
    positions[0, 0, -1] = 3
    with pytest.raises(
        ValueError, match="got a prompt that ends with an image, expected one whose last token is text"
    ):
        model.generate(**cut, position_ids=positions, assistant_model=make_assistant(model), **ARGUMENTS)


def test_other_inputs_are_refused():
    model, prompts = VISION["LLaVA"].model(), first_row(VISION["LLaVA"].prompts())
    with pytest.raises(ValueError, match=r"got model inputs \['labels'\], expected none but"):
        model.generate(**prompts, labels=prompts["input_ids"], assistant_model=make_assistant(model), **ARGUMENTS)


def test_images_are_not_read_in_chunks():
    model, prompts = VISION["LLaVA"].model(), first_row(VISION["LLaVA"].prompts())
    with pytest.raises(ValueError, match="got prefill_chunk_size=4 with images, expected None"):
        model.generate(**prompts, prefill_chunk_size=4, assistant_model=make_assistant(model), **ARGUMENTS)
