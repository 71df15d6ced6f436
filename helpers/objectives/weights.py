"""Loss weights of a diffusion schedule's timesteps, by the ratio of signal to noise S = abar / (1 - abar)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def loss_weight(weighting: str, alphas_cumprod: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """The weight of the squared error of what the network predicts, for abar of any shape, in abar's precision.

    One error of the picture is S times as large in the noise and S + 1 times in the velocity (both squared), so a weight w of the
    picture's error is w / S of the noise's and w / (S + 1) of the velocity's. The velocity's is finite at both ends of a
    schedule; the others are made from it by 1 / (S + 1) = 1 - abar and S / (S + 1) = abar, without dividing by S: for epsilon
    there is none where only noise is left (zero terminal SNR refuses epsilon), for the picture none where there is no noise.
    """
    noise = 1 - alphas_cumprod
    velocity = _OF_VELOCITY[weighting](alphas_cumprod, noise, gamma or 0.0)
    return {"v_prediction": velocity, "epsilon": velocity / alphas_cumprod, "sample": velocity / noise}[prediction_type]


def _min_snr(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Hang et al. (2023), section 3.4: the picture's is min(S, gamma)."""
    return signal.minimum(gamma * noise)


def _soft_min_snr(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Crowson et al. (2024): the picture's is S gamma / (S + gamma), min-SNR without its corner.

    With gamma = 1 / sigma_data^2 it is 1 / (sigma^2 + sigma_data^2) of the noise level sigma = sqrt((1 - abar) / abar).
    """
    return signal * noise * gamma / (signal + gamma * noise)


def _debiased(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Yu et al. (2023), "Unmasking Bias in Diffusion Model Training": the noise's is 1 / sqrt(S)."""
    return (signal * noise).sqrt()


_OF_VELOCITY: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "min_snr": _min_snr,
    "soft_min_snr": _soft_min_snr,
    "debiased": _debiased,
}
