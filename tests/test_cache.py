"""TreeCache and ContemplateContext on plain tensors: which rows are stored, returned, moved and exported."""

from __future__ import annotations

import pytest
import torch
from tiny_caches import DIM, HEADS, LAYERS, PROMPTS, filled, prompt_ids, soft_prompts, states
from tiny_models import (
    ARCHITECTURES,
    LAYER_IDS,
    NUM_LAYERS,
    keep_softmax_in_float64,
    tiny_mistral,
)
from transformers import DynamicCache

from confu_hf.compat import cache_keyword
from confu_hf.target.cache import TreeCache
from confu_hf.target.context import ContemplateContext
from confu_hf.target.passes import prefill
from confu_hf.target.slots import Slots


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def test_update_appends_and_hides_the_soft_prompts():
    cache, first, second = TreeCache(LAYERS, soft_prompts()), states(7), states(2)
    cache.update(*first, 0)
    keys, values = cache.update(*second, 0)
    assert torch.equal(keys, torch.cat([first[0], second[0]], dim=2))
    assert torch.equal(values, torch.cat([first[1], second[1]], dim=2))
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.get_seq_length() == 9 and cache.get_mask_sizes(4, 0) == (13, 0)
    assert cache.is_sliding == [False] * LAYERS


def test_verifying_shows_the_soft_prompts_and_commits_nothing():
    prompts, committed, new = soft_prompts(), states(7, 2), states(3, 2)
    cache = TreeCache(LAYERS, prompts)
    cache.update(*committed, 1)
    with cache.writing(cache.slots_behind(3)):
        keys, values = cache.update(*new, 1)
        assert cache.get_seq_length(1) == 7
    for got, prompt, old, rows in zip((keys, values), prompts[1], committed, new, strict=True):
        expected = prompt.transpose(0, 1).expand(2, -1, -1, -1)  # (B, kv_heads, S, head_dim)
        assert torch.equal(got, torch.cat([expected, old, rows], dim=2))
    assert cache.get_seq_length(1) == 7


@pytest.mark.parametrize("path", [[0], [0, 1, 2], [0, 2], [0, 1, 4, 6], [0, 3, 4, 5, 6]])
@pytest.mark.parametrize("capacity", [1, 4, 256])
def test_keep_path_commits_the_rows_of_the_path(path, capacity):
    cache = filled(5, prompts=soft_prompts(), capacity=capacity)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    new = [states(7) for _ in range(LAYERS)]
    with cache.writing(cache.slots_behind(7)):
        for i in range(LAYERS):
            cache.update(*new[i], i)
    cache.keep_path(torch.tensor([path]), [len(path)])
    assert cache.get_seq_length() == 5 + len(path)
    for layer, old, rows in zip(cache.layers, before, new, strict=True):
        assert torch.equal(layer.keys, torch.cat([old[0], rows[0][:, :, path]], dim=2))
        assert torch.equal(layer.values, torch.cat([old[1], rows[1][:, :, path]], dim=2))


def verify_pass(cache: TreeCache, width: int, batch: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    new = [states(width, batch) for _ in range(LAYERS)]
    with cache.writing(cache.slots_behind(width, batch_size=batch)):
        for i in range(LAYERS):
            cache.update(*new[i], i)
    return new


def test_rows_of_a_batch_have_lengths_of_their_own():
    """Three rounds of ragged paths; the third row ends after the first."""
    cache = filled(5, batch=3, prompts=soft_prompts(), capacity=8)
    cache.set_mask(torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]))
    expected = [
        [layer.keys[b] for b in range(3)] for layer in cache.layers
    ]  # per layer and row (kv_heads, n, head_dim)
    for paths in ([[0, 1, 5], [0, -1, -1], [0, 3, -1]], [[0, 2], [0, 1], [-1, -1]], [[0], [0], [-1]]):
        counts = [sum(node >= 0 for node in path) for path in paths]
        new = verify_pass(cache, 6, 3)
        cache.keep_path(torch.tensor(paths), counts)
        for layer, (keys, _) in enumerate(new):
            for b, path in enumerate(paths):
                kept = keys[b][:, [node for node in path if node >= 0]]
                expected[layer][b] = torch.cat([expected[layer][b], kept], dim=1)
    assert cache.lengths == [11, 9, 7]
    for layer, rows in zip(cache.layers, expected, strict=True):
        for b, keys in enumerate(rows):
            assert torch.equal(layer.keys[b, :, : keys.shape[1]], keys)
    places = cache.slot_position_ids.tolist()
    assert places[0] == list(range(11))
    assert places[1] == [-1, *range(8), -1, -1]
    assert places[2] == [-1, -1, -1, *range(4), -1, -1, -1, -1]
    assert cache.next_positions().tolist() == [[11], [8], [4]]
    with pytest.raises(ValueError, match=r"got batch rows of lengths \[11, 9, 7\], expected one length"):
        cache.update(*states(1, 3), 0)


def test_what_goes_to_the_spare_slot_is_read_by_nobody():
    cache, poison = filled(4, batch=2, capacity=8), float("nan")
    slots = Slots(torch.tensor([[4, 5], [4, -1]]), None, 6)
    keys, values = states(2, 2)
    keys[1, :, 1] = poison
    with cache.writing(slots):
        got, _ = cache.update(keys, values, 0)
    assert torch.equal(got[0, :, 4:], keys[0]) and torch.equal(got[1, :, 4], keys[1, :, 0])
    assert not got.isnan().any()


def test_a_second_pass_overwrites_the_first():
    cache = filled(5)
    for width in (6, 3):
        new = verify_pass(cache, width)
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="after a verify pass of 3 rows"):
        cache.keep_path(torch.tensor([[0, 1, 2, 3]]), [4])
    cache.keep_path(torch.tensor([[0, 2]]), [2])
    assert torch.equal(cache.layers[0].keys[:, :, 5:], new[0][0][:, :, [0, 2]])


def test_keep_path_without_a_verify_pass_is_refused():
    cache = filled(5)
    with pytest.raises(ValueError, match="verify pass of 0 rows.*Call keep_path"):
        cache.keep_path(torch.tensor([[0]]), [1])
    verify_pass(cache, 2)
    cache.keep_path(torch.tensor([[0]]), [1])
    with pytest.raises(ValueError, match="verify pass of 0 rows"):
        cache.keep_path(torch.tensor([[0]]), [1])


def test_capacity_doubles_and_nothing_moves_in_between():
    cache = TreeCache(1, soft_prompts()[:1], capacity=16)
    cache.update(*states(3), 0)
    layer, sizes, addresses = cache.layers[0], set(), set()
    everything = [layer.keys.clone()]
    for _ in range(40):
        new = states(1)
        keys, _ = cache.update(*new, 0)
        everything.append(new[0])
        addresses.add(layer._buffers[0].data_ptr())
        sizes.add(layer.capacity)
    assert torch.equal(keys, torch.cat(everything, dim=2))
    assert sizes == {16, 32, 64} and len(addresses) == 3
    cache.reserve(200)
    assert layer.capacity == 200 and torch.equal(layer.keys, keys)


@pytest.mark.parametrize("capacity, grown", [(600, 1200), (4096, 5120), (65536, 69632)])
def test_a_long_context_does_not_take_twice_its_memory_for_one_token_more(capacity, grown):
    layer = TreeCache(1, capacity=capacity).layers[0]
    layer.update(torch.zeros(1, 1, capacity, 1), torch.zeros(1, 1, capacity, 1))
    layer.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert layer.capacity == grown and layer.keys.sum() == 1


def test_growth_in_a_pass_keeps_prompts_committed_rows_and_rows_behind_them():
    prompts = soft_prompts()
    cache = filled(5, prompts=prompts, capacity=4)
    before, new = cache.layers[2].keys.clone(), states(3)
    with cache.writing(cache.slots_behind(3)):
        cache.update(*new, 2)
    with cache.writing(cache.slots_behind(27, offset=3)):
        keys, _ = cache.update(*states(27), 2)
    assert torch.equal(keys[:, :, :PROMPTS], prompts[2, 0].transpose(0, 1)[None])
    assert torch.equal(keys[:, :, PROMPTS : PROMPTS + 8], torch.cat([before, new[0]], dim=2))


def test_set_soft_prompts_replaces_them_in_place():
    cache = filled(5, batch=2, prompts=soft_prompts())
    address, per_row = cache.layers[0]._buffers[0].data_ptr(), torch.randn(LAYERS, 2, 2, PROMPTS, HEADS, DIM)
    cache.set_soft_prompts(per_row)
    with cache.writing(cache.slots_behind(1)):
        keys, values = cache.update(*states(1, 2), 0)
    assert cache.layers[0]._buffers[0].data_ptr() == address
    assert torch.equal(keys[:, :, :PROMPTS], per_row[0, 0].transpose(1, 2))
    assert torch.equal(values[:, :, :PROMPTS], per_row[0, 1].transpose(1, 2))
    with pytest.raises(ValueError, match="got 0 soft prompt slots, expected 5"):
        cache.set_soft_prompts(None)


def test_soft_prompts_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="got 3 layers, expected 4"):
        TreeCache(4, soft_prompts())
    with pytest.raises(ValueError, match=r"expected \(2, S, kv_heads, head_dim\)"):
        TreeCache(LAYERS, soft_prompts().transpose(1, 2))
    cache = TreeCache(LAYERS, torch.randn(LAYERS, 2, PROMPTS, HEADS + 1, DIM))
    with pytest.raises(ValueError, match="adapter made for this target"):
        cache.update(*states(3), 0)


def test_crop_takes_negative_numbers():
    cache = filled(5)
    kept = cache.layers[0].keys[:, :, :3].clone()
    cache.crop(-2)
    cache.crop(0)
    assert cache.get_seq_length() == 3 and torch.equal(cache.layers[0].keys, kept)
    new = states(1)
    assert torch.equal(cache.update(*new, 0)[0], torch.cat([kept, new[0]], dim=2))
    for wrong in (1, -5):
        with pytest.raises(ValueError, match=rf"crop\(\): got {wrong}, expected a number from -3 to 0"):
            cache.layers[1].crop(wrong)


def test_states_that_require_a_gradient_are_refused():
    keys, values = states(3)
    with pytest.raises(ValueError, match="torch.no_grad"):
        TreeCache(LAYERS).update(keys.requires_grad_(), values, 0)


def test_usable_inside_and_outside_of_inference_mode():
    cache = TreeCache(LAYERS, soft_prompts())
    with torch.inference_mode():
        cache.update(*states(3), 0)
    with torch.no_grad():
        cache.update(*states(3), 0)
    assert cache.get_seq_length() == 6


def test_reset_and_batch_operations():
    cache = filled(5, batch=2, prompts=soft_prompts())
    keys = cache.layers[0].keys.clone()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, keys.repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.layers[0].keys, keys[1:])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
    cache.update(*states(2, 3), 0)
    assert cache.layers[0].keys.shape == (3, HEADS, 2, DIM)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefill_is_bit_identical_to_a_dynamic_cache(name):
    model, ids = ARCHITECTURES[name](), prompt_ids(2)
    prompts = torch.randn(NUM_LAYERS, 2, PROMPTS, 2, 8)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for attention_mask in (None, mask):
        plain, ours = DynamicCache(), TreeCache(NUM_LAYERS, prompts)
        expected = prefill(model, ids, plain, LAYER_IDS, attention_mask=attention_mask)
        got = prefill(model, ids, ours, LAYER_IDS, attention_mask=attention_mask)
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.features, expected.features)
        for layer, reference in zip(ours.layers, plain.layers, strict=True):
            assert torch.equal(layer.keys, reference.keys) and torch.equal(layer.values, reference.values)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_plain_generate_with_a_tree_cache(name, do_sample):
    model, ids = ARCHITECTURES[name](), prompt_ids()
    cache = TreeCache(NUM_LAYERS, torch.randn(NUM_LAYERS, 2, PROMPTS, 2, 8), capacity=4)
    outputs = []
    for users in (None, cache):
        torch.manual_seed(0)
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": do_sample}
        outputs.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **cache_keyword(model, users), **options)
        )
    assert torch.equal(*outputs)
    assert cache.get_seq_length() == outputs[0].shape[1] - 1


def test_contemplate_context_puts_prompts_with_gradient_in_front_and_keeps_nothing():
    committed, new, prompts = states(6, 2), states(3, 2), soft_prompts().requires_grad_()
    cache = DynamicCache()
    for i in range(LAYERS):
        cache.update(*committed, i)
    context = ContemplateContext(cache, prompts)
    for _ in range(2):
        keys, values = context.update(*new, 1)
    for got, prompt, old, rows in zip((keys, values), prompts[1], committed, new, strict=True):
        assert torch.equal(got, torch.cat([prompt.transpose(0, 1).expand(2, -1, -1, -1), old, rows], dim=2))
    assert context.get_seq_length() == 6 and context.soft_prompt_length == PROMPTS
    (keys.sum() + values.sum()).backward()
    assert torch.equal(prompts.grad[1], torch.full_like(prompts[1], 2.0)) and not prompts.grad[0].any()
    assert torch.equal(ContemplateContext(cache).update(*new, 0)[0], torch.cat([committed[0], new[0]], dim=2))


def test_contemplate_context_refuses_dropped_rows_and_wrong_prompts():
    model, ids = tiny_mistral(), prompt_ids()
    users = DynamicCache(config=model.config)
    prefill(model, ids, users, LAYER_IDS)
    with pytest.raises(ValueError, match="got 5 of 11 tokens.*without a config"):
        ContemplateContext(users)
    with pytest.raises(ValueError, match="got 3 layers, expected 8"):
        whole = DynamicCache()
        prefill(model, ids, whole, LAYER_IDS)
        ContemplateContext(whole, soft_prompts())
