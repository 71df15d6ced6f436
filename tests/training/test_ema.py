"""The average of the weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from helpers.config.options import EmaOptions
from helpers.training.ema import Average, warmed_decay


def average(parameter: nn.Parameter, **options: object) -> Average:
    return Average({"w": parameter}, dataclasses.replace(EmaOptions(), **options))


def test_warm_up_follows_its_formula() -> None:
    assert [round(warmed_decay(0.9999, n), 4) for n in (1, 10, 100, 1000)] == [0.1818, 0.55, 0.9182, 0.9911]
    assert warmed_decay(0.9, 1000) == 0.9
    shadow = average(nn.Parameter(torch.ones(1)), ema_decay=0.9)
    for step in range(1, 20):
        shadow.update(step)
    assert shadow.decay == 0.9  # what was asked for is not overwritten by what is warming up


def test_the_average_of_bf16_weights_changes_because_it_is_float32() -> None:
    """From 0 towards 1 with decay 0.9999 for 20,000 steps: 1 - 0.9999^20000 = 0.8647; in bfloat16 it would stop at 0.0313."""
    weights = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    shadow = average(weights, ema_decay=0.9999)
    weights.data.fill_(1.0)
    for step in range(100_000, 120_000):
        shadow.update(step)
    assert shadow.shadow["w"].item() == pytest.approx(0.8647, abs=1e-3)


def test_interval_gives_the_same_average_of_constant_weights() -> None:
    weights = nn.Parameter(torch.ones(1))
    every, third = average(weights, ema_decay=0.5), average(weights, ema_decay=0.5, ema_update_interval=3)
    for shadow in (every, third):
        shadow.shadow["w"].zero_()
        for step in range(1000, 1006):
            shadow.update(step)
    assert third.shadow["w"].item() == pytest.approx(every.shadow["w"].item(), abs=1e-6)


def test_live_weights_are_bit_equal_after_a_swap_that_failed() -> None:
    weights = nn.Parameter(torch.randn(100).to(torch.bfloat16))
    before = weights.detach().clone()
    shadow = average(weights)
    shadow.shadow["w"].fill_(3.0)
    with pytest.raises(RuntimeError, match="inside"), shadow.swapped_in():
        assert weights.eq(3.0).all()
        raise RuntimeError("inside")
    assert torch.equal(weights, before)
