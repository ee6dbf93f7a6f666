"""Accepted lengths by hand."""

from __future__ import annotations

import math

import pytest

from confu_hf.metrics import acceptance_by_depth, mean_accepted_length


def test_by_hand():
    assert mean_accepted_length([3, 1, 2]) == 2.0
    assert acceptance_by_depth([3, 1, 2]) == pytest.approx((2 / 3, 1 / 3))
    assert mean_accepted_length([3, 1, 2]) == pytest.approx(1 + sum(acceptance_by_depth([3, 1, 2])))


def test_nothing_drafted_and_nothing_done():
    assert acceptance_by_depth([1, 1]) == () and acceptance_by_depth([]) == ()
    assert math.isnan(mean_accepted_length([]))
