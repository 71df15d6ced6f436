"""Huber and every weighting of diffusion for a family's answer; the expected side is formulas in the signal that is left."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import huber_loss

from helpers.data.batches import Batch
from tests.families.conftest import Tried

COSINE = "squaredcos_cap_v2"  # schedules whose end no debiased weight of the noise can have


def other_losses(
    tried: Tried, batch: Batch, predicts: str, predicted: Tensor, target: Tensor, kept: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B,) losses of ours with what they should be. `kept` is abar of each sample, as diffusers' scheduler has it."""
    snr = kept.double() / (1 - kept.double())
    squares = ((predicted - target) ** 2).mean(dim=(1, 2, 3)).double()
    of_the_picture = {"min_snr": snr.clamp(max=3), "soft_min_snr": 3 * snr / (snr + 3), "debiased": snr.sqrt()}
    larger = {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[predicts]
    if predicts == "epsilon" and tried.family.scheduler_config["beta_schedule"] == COSINE:
        del of_the_picture["debiased"]
    for weighting, weight in of_the_picture.items():
        yield _ours(tried, batch, predicted, prediction_type=predicts, loss_weighting=weighting, snr_gamma=3.0), squares * weight / larger
    huber = 2 * huber_loss(predicted, target, reduction="none", delta=0.3).mean(dim=(1, 2, 3)).double()
    yield _ours(tried, batch, predicted, prediction_type=predicts, loss="huber", huber_delta=0.3), huber


def _ours(tried: Tried, batch: Batch, predicted: Tensor, **options: object) -> Tensor:
    objective = tried.objective(**options)
    return objective.loss(predicted, objective.corrupt(batch.latents, batch.draws)).double()
