"""AdamW on bfloat16 weights: right on average, and where float32 is given, torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.training.adamw_bf16 import AdamWBF16, round_stochastically


def test_small_updates_arrive_on_average() -> None:
    """1 - 1000 x 0.001 = 0 in the mean; rounded to nearest, bfloat16 would stay at 1."""
    torch.manual_seed(0)
    weights = torch.ones(2000, dtype=torch.bfloat16)
    for _ in range(1000):
        round_stochastically(weights.float() - 0.001, weights)
    assert weights.float().mean().item() == pytest.approx(0.0, abs=0.01)


def test_rounding_is_unbiased_and_keeps_what_bf16_can_hold() -> None:
    torch.manual_seed(0)
    exact = torch.full((100_000,), 1.0 + 1 / 512)  # a quarter of the way to the next bfloat16, 1 + 1/128
    target = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(exact, target)
    assert set(target.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert target.float().mean().item() == pytest.approx(1.0 + 1 / 512, abs=1e-4)
    for value in (-2.5, 0.0, float("inf"), float("-inf")):
        round_stochastically(torch.tensor([value]), target[:1])
        assert target[0].item() == value


def test_float32_weights_follow_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(50)), nn.Parameter(torch.zeros(50))
    theirs.data.copy_(ours.data)
    optimizers = [AdamWBF16([ours], lr=1e-2, weight_decay=0.1), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)]
    for _ in range(20):
        gradient = torch.randn(50)
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            weights.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_bf16_weights_follow_float32_ones_on_average() -> None:
    torch.manual_seed(0)
    weights, exact = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16)), nn.Parameter(torch.ones(1))
    ours, theirs = AdamWBF16([weights], lr=1e-4, weight_decay=0.0), torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        weights.grad, exact.grad = torch.full_like(weights, 0.3), torch.full_like(exact, 0.3)
        ours.step()
        theirs.step()
    assert weights.float().mean().item() == pytest.approx(exact.item(), abs=5e-4)


def test_weight_decay_is_not_lost_in_bf16() -> None:
    """lr x decay = 1e-5 is far below half a step of bfloat16; after 10,000 steps (1 - 1e-5)^10000 = 0.9048 is left."""
    torch.manual_seed(0)
    weights = nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    optimizer = AdamWBF16([weights], lr=1e-3, weight_decay=1e-2)
    weights.grad = torch.zeros_like(weights)
    for _ in range(10_000):
        optimizer.step()
    assert weights.float().mean().item() == pytest.approx(0.9048, abs=0.01)
