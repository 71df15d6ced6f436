"""Loss masks against closed forms: what they leave out has no influence and no gradient, whatever the loss and its weighting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from helpers.config.options import ObjectiveOptions
from helpers.data.base.draws import StepDraws
from helpers.objectives.diffusion import Diffusion
from helpers.objectives.flow import FlowMatching
from helpers.protocols import Corrupted, Objective

DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}
RANDOM = torch.Generator().manual_seed(0)
LATENTS, ERROR = (torch.randn(3, 4, 8, 8, generator=RANDOM) for _ in range(2))
MASKS = torch.rand(3, 1, 8, 8, generator=RANDOM)
MASKS[0, :, :, 3:], MASKS[1] = 0, (MASKS[1] > 0.9).float()
WAYS: list[dict[str, Any]] = [
    {},
    {"loss": "huber", "huber_delta": 0.3},
    *({"loss_weighting": name, "snr_gamma": 5.0} for name in ("min_snr", "soft_min_snr", "debiased")),
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "loss_weighting": "min_snr", "snr_gamma": 5.0},
    {"prediction_type": "sample", "snr_weight": 2.0},
]


def asked(objective: Objective) -> tuple[Objective, Corrupted]:
    return objective, objective.corrupt(LATENTS, StepDraws(seed=1, step=7, places=(0, 1, 2), step_samples=3))


def objectives() -> list[tuple[Objective, Corrupted]]:
    options = [dataclasses.replace(ObjectiveOptions(), **way) for way in WAYS]
    return [*(asked(Diffusion(chosen, DIFFUSION)) for chosen in options), *(asked(FlowMatching(chosen, FLOW)) for chosen in options[:2])]


def distance(error: float, way: dict[str, Any]) -> float:
    """Of one number, as OBJECTIVES.md has it."""
    size, delta = abs(error), way.get("huber_delta", 0.0)
    return delta * (2 * size - delta) if way.get("loss") == "huber" and size > delta else error * error


@pytest.mark.parametrize("number", range(len(WAYS) + 2))
def test_the_loss_is_the_mean_of_distances_weighted_by_the_mask(number: int) -> None:
    objective, corrupted = objectives()[number]
    way = WAYS[number % len(WAYS)]
    losses = objective.loss(corrupted.target + ERROR, corrupted, MASKS)
    for sample in range(3):
        error, mask = ERROR[sample].double(), MASKS[sample, 0].double()
        total = sum(mask[y, x].item() * distance(error[c, y, x].item(), way) for c in range(4) for y in range(8) for x in range(8))
        expected = total / (4 * mask.sum().item()) * corrupted.weight[sample].item()
        assert losses[sample].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", range(len(WAYS) + 2))
def test_what_is_outside_has_a_gradient_of_exactly_0(number: int) -> None:
    objective, corrupted = objectives()[number]
    prediction = (corrupted.target + ERROR).requires_grad_()
    losses = objective.loss(prediction, corrupted, MASKS)
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    is_outside = (MASKS == 0).expand_as(gradient)
    trained = corrupted.weight > 0  # not where only noise is left
    assert not gradient[is_outside].any() and gradient[trained][~is_outside[trained]].all()
    elsewhere = prediction.detach() + 100 * is_outside
    assert torch.equal(objective.loss(elsewhere, corrupted, MASKS), losses)


def test_a_white_mask_is_none_and_the_brightness_of_a_mask_is_no_factor() -> None:
    for objective, corrupted in objectives():
        prediction = corrupted.target + ERROR
        plain = objective.loss(prediction, corrupted)
        assert torch.allclose(objective.loss(prediction, corrupted, torch.ones(3, 1, 8, 8)), plain, rtol=1e-6)
        masked = objective.loss(prediction, corrupted, MASKS)
        assert torch.allclose(objective.loss(prediction, corrupted, 0.25 * MASKS), masked, rtol=1e-6)
        assert not torch.allclose(masked, plain, rtol=1e-2)
