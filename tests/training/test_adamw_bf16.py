"""AdamW on bfloat16 weights: right on average; on float32 weights the same as torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.training import adamw_bf16
from helpers.training.adamw_bf16 import AdamWBF16, rounded_stochastically


def rounded(exact: torch.Tensor) -> torch.Tensor:
    return rounded_stochastically(exact, torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32)).bfloat16()


def test_small_updates_arrive_on_average() -> None:
    """1 - 1000 x 0.001 = 0 in the mean, with a spread of 0.041; rounded to nearest, bfloat16 stays at 1."""
    torch.manual_seed(0)
    weights = nearest = torch.ones(2000, dtype=torch.bfloat16)
    for _ in range(1000):
        weights = rounded(weights.float() - 0.001)
        nearest = (nearest.float() - 0.001).bfloat16()
    assert weights.float().mean().item() == pytest.approx(0.0, abs=3 * 0.041 / 2000**0.5)
    assert weights.float().std().item() == pytest.approx(0.041, abs=0.004)
    assert nearest.eq(1).all()


def test_rounding_is_unbiased_and_keeps_what_bf16_can_hold() -> None:
    torch.manual_seed(0)
    exact = torch.full((100_000,), 1.0 + 1 / 512)  # a quarter of the way to the next bfloat16, 1 + 1/128
    target = rounded(exact)
    assert set(target.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert target.float().mean().item() == pytest.approx(1.0 + 1 / 512, abs=1e-4)
    for value in (-2.5, 0.0, float("inf"), float("-inf")):
        assert rounded(torch.tensor([value])).item() == value
    every_bit_set = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN that CUDA computes
    assert rounded(every_bit_set).isnan()


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


SHAPES = [(32, 16, 3, 3), (32,), (64, 32), (7,), (1,), (5, 3)]


def by_hand(parameters: list[torch.Tensor], moments: list[list[torch.Tensor]], gradients: list[torch.Tensor], step: int) -> None:
    """Algorithm 2 of Loshchilov and Hutter, tensor by tensor, each of its three results rounded in turn."""
    rate, decay, beta1, beta2, epsilon = 1e-2, 0.1, 0.9, 0.999, 1e-8
    for weights, (mean, square), gradient in zip(parameters, moments, gradients, strict=True):
        first = mean.float().lerp(gradient.float(), 1 - beta1)
        second = square.float().mul(beta2).addcmul(gradient.float(), gradient.float(), value=1 - beta2)
        deviation = (second / (1 - beta2**step)).sqrt().add(epsilon)
        exact = weights.float() * (1 - rate * decay)
        exact.addcdiv_(first, deviation, value=-rate / (1 - beta1**step))
        for target, values in ((weights, exact), (mean, first), (square, second)):
            target.copy_(rounded(values))


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 22])
def test_weights_updated_together_are_those_updated_one_by_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in chunks of any size: rounding bits belong to a place among the weights."""
    monkeypatch.setitem(adamw_bf16.CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    expected = [parameter.detach().clone() for parameter in weights]
    moments = [[torch.zeros_like(tensor), torch.zeros_like(tensor)] for tensor in expected]
    optimizer = AdamWBF16(weights, lr=1e-2, weight_decay=0.1)
    for step in range(1, 6):
        gradients = [torch.randn(shape).bfloat16() for shape in SHAPES]
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.grad = gradient
        torch.manual_seed(step)
        optimizer.step()
        torch.manual_seed(step)
        by_hand(expected, moments, gradients, step)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, expected, strict=True))
    assert all(torch.equal(optimizer.state[ours]["exp_avg_sq"], theirs[1]) for ours, theirs in zip(weights, moments, strict=True))


def test_a_weight_without_a_gradient_stays_and_counts_its_own_steps() -> None:
    moving, resting = nn.Parameter(torch.ones(4).bfloat16()), nn.Parameter(torch.ones(4).bfloat16())
    optimizer = AdamWBF16([moving, resting], lr=1e-1)
    for _ in range(3):
        moving.grad = torch.ones_like(moving)
        optimizer.step()
    assert torch.equal(resting, torch.ones_like(resting)) and not torch.equal(moving, torch.ones_like(moving))
    resting.grad = torch.ones_like(resting)
    optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in (moving, resting)] == [4, 1]
