"""Compiled attention computes what `scaled_dot_product_attention` does, for the few rows of a verify pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_products import KINDS, pytestmark  # noqa: F401 - skips where nothing can be compiled
from torch import Tensor
from torch.nn import functional as F

from confu_hf.acceleration.products import Products, build_products

HIDDEN = torch.finfo(torch.float32).min


@pytest.fixture(scope="module", params=KINDS)
def products(request, tmp_path_factory):
    return build_products(request.param, tmp_path_factory.mktemp("compiled"))


def inputs(batch: int, heads: int, key_heads: int, rows: int, keys: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as projections leave them; keys and values in the middle of a cache's slots."""
    torch.manual_seed(rows + keys)
    slots = torch.randn(2, batch, key_heads, keys + 20, d)
    query = torch.randn(batch, rows, heads, d).transpose(1, 2)
    return query, slots[0, :, :, 3 : 3 + keys], slots[1, :, :, 3 : 3 + keys]


def some_mask(batch: int, rows: int, keys: int) -> Tensor:
    return torch.zeros(batch, 1, rows, keys).masked_fill_(torch.rand(batch, 1, rows, keys) < 0.3, HIDDEN)


def expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    mask = None if mask is None else mask.double()
    states = (query.double(), key.double(), value.double())
    return (
        F.scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2).float()
    )


def check(products: Products, mask: Tensor | None, *states: Tensor) -> None:
    assert products.attends(*states, mask)
    got = products.attention(*states, mask, 0.3)
    torch.testing.assert_close(got, expected(*states, mask, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape",  # batch, heads, key heads, rows, keys, width of a head
    [
        (1, 9, 3, 1, 300, 64),  # one vector of lanes
        (1, 9, 3, 8, 308, 64),
        (2, 4, 2, 9, 70, 16),
        (1, 8, 1, 20, 1000, 80),  # one head for all; five vectors wide
        (1, 4, 4, 3, 65, 128),  # a head for each
        (3, 6, 2, 64, 130, 32),  # several blocks of lanes
        (1, 2, 1, 2, 1, 16),
    ],
)
def test_equal_to_scaled_dot_product_attention(shape, products):
    batch, *_, rows, keys, _ = shape
    mask, states = some_mask(batch, rows, keys), inputs(*shape)
    mask[..., -1] = 0.0  # every row sees something
    check(products, mask, *states)
    check(products, mask[:1], *states)
    check(products, torch.zeros_like(mask), *states)
    if rows == 1:
        check(products, None, *states)


def test_rows_that_see_nothing_see_all_alike(products):
    states, mask = inputs(1, 4, 2, 3, 200, 32), torch.zeros(1, 1, 3, 200)
    mask[0, 0, 1], mask[0, 0, 2, :150] = HIDDEN, HIDDEN
    check(products, mask, *states)


def test_great_scores_do_not_overflow(products):
    query, key, value = inputs(1, 2, 1, 4, 100, 32)
    check(products, torch.zeros(1, 1, 4, 100), 300 * query, key, value)


def test_rows_do_not_influence_each_other(products):
    """Nor does what is hidden: slots of a cache may hold anything but NaN."""
    (query, key, value), mask = inputs(1, 6, 2, 5, 90, 32), torch.zeros(1, 1, 5, 90)
    alone = products.attention(query, key, value, mask, 0.2)
    changed = query.clone(memory_format=torch.preserve_format)
    changed[:, :, 3] = float("nan")
    got = products.attention(changed, key, value, mask, 0.2)
    assert got[:, 3].isnan().all() and torch.equal(got[:, [0, 1, 2, 4]], alone[:, [0, 1, 2, 4]])
    mask[..., 40:60] = HIDDEN
    hidden = products.attention(query, key, value, mask, 0.2)
    key[:, :, 40:60], value[:, :, 40:60] = 1e30, 1e30
    assert torch.equal(products.attention(query, key, value, mask, 0.2), hidden)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads, products):
    states, mask = inputs(2, 4, 2, 3, 130, 32), some_mask(2, 3, 130)
    mask[..., 0] = 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(products, mask, *states)
    finally:
        torch.set_num_threads(before)


def test_fewer_threads_than_asked_for(products):
    """As an operating system, or who calls from a thread of OpenMP, may leave it."""
    code = f"""
import torch
from pathlib import Path
from confu_hf.acceleration.products import Products
torch.manual_seed(1)
products, query = Products(Path({str(products.path)!r}), 0.0), torch.randn(1, 2, 4, 16).transpose(1, 2)
key, value, mask = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16), torch.zeros(1, 1, 2, 300)
torch.set_num_threads(4)
got = products.attention(query, key, value, mask, 0.3).transpose(1, 2)
want = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_what_it_does_not_take(products):
    query, key, value = inputs(1, 4, 2, 3, 50, 32)
    mask = torch.zeros(1, 1, 3, 50)
    assert products.attends(query, key, value, mask)
    refused = {
        "causal": (query, key, value, None),
        "boolean": (query, key, value, mask.bool()),
        "by head": (query, key, value, mask.expand(-1, 4, -1, -1)),
        "bfloat16": (query.bfloat16(), key.bfloat16(), value.bfloat16(), mask),
        "other queries": (query.contiguous(), key, value, mask),
        "values wider": (query, key, torch.cat([value, value], dim=-1), mask),
        "slots apart": (query, key[:, :, ::2], value[:, :, ::2], mask[..., ::2]),
        "narrow heads": (query[..., :4], key[..., :4], value[..., :4], mask),
    }
    assert not [name for name, states in refused.items() if products.attends(*states)]
