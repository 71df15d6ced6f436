"""Loss weights of the timesteps of a diffusion schedule, by the signal-to-noise ratio S = abar / (1 - abar)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def loss_weight(weighting: str, alphas_cumprod: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """The weight of the squared error of the prediction, for abar of any shape, in abar's dtype.

    The same wrong image has a squared error S times as large in the noise, and S + 1 times as large in the velocity. So a weight w for the
    image error is w / S for the noise error and w / (S + 1) for the velocity error. The velocity weight is finite at both ends of the
    schedule. The others follow from it by 1 / (S + 1) = 1 - abar and S / (S + 1) = abar, without a division by S. The epsilon weight does
    not exist where only noise is left (zero terminal SNR refuses epsilon), the image weight does not exist where there is no noise.
    """
    noise = 1 - alphas_cumprod
    velocity = _OF_VELOCITY[weighting](alphas_cumprod, noise, gamma or 0.0)
    return {"v_prediction": velocity, "epsilon": velocity / alphas_cumprod, "sample": velocity / noise}[prediction_type]


def _min_snr(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Hang et al. (2023), section 3.4: the image weight is min(S, gamma)."""
    return signal.minimum(gamma * noise)


def _soft_min_snr(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Crowson et al. (2024): the image weight is S gamma / (S + gamma), a smooth min-SNR.

    With gamma = 1 / sigma_data^2 this is 1 / (sigma^2 + sigma_data^2), where sigma = sqrt((1 - abar) / abar) is the noise level.
    """
    return signal * noise * gamma / (signal + gamma * noise)


def _debiased(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """Yu et al. (2023), "Unmasking Bias in Diffusion Model Training": the noise weight is 1 / sqrt(S)."""
    return (signal * noise).sqrt()


_OF_VELOCITY: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "min_snr": _min_snr,
    "soft_min_snr": _soft_min_snr,
    "debiased": _debiased,
}
