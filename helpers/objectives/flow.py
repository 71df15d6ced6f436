"""Flow matching along straight lines (rectified flow): the network answers with the velocity from a picture to noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from helpers.config.declare import show
from helpers.config.facts import Facts, Settings
from helpers.config.options import OPTIONS
from helpers.errors import ConfigError
from helpers.objectives.losses import weighted_loss
from helpers.objectives.timesteps import uniform_numbers
from helpers.protocols import Corrupted

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.data.base.draws import StepDraws

STEEPEST_MODE = 2 / (math.pi - 2)  # beyond, and below -1, mode sampling's function is not monotone
SAMPLERS: Mapping[str, str] = {"euler": "FlowMatchEulerDiscreteScheduler"}
# Options of diffusion => why flow matching has no use for them.
REFUSED: Mapping[str, str] = {
    "prediction_type": "flow matching always learns the velocity noise - picture",
    "rescale_betas_zero_snr": "the schedule of flow matching ends in pure noise by itself",
    "loss_weighting": "min-SNR (--snr_gamma) and its like weigh the steps of a diffusion schedule; here --weighting_scheme does",
    "snr_weight": "it stands in for min-SNR weighting; change --learning_rate",
    "offset_noise": "straight paths end in noise of zero mean, from which pictures of any brightness can be made",
    "input_perturbation": "it is for the noise of diffusion",
    "timestep_bias_strategy": "it names steps of a diffusion schedule; --weighting_scheme and --logit_mean say what is drawn more often",
    "training_scheduler_timestep_spacing": "a flow schedule has one spacing; --flow_shift bends it",
    "inference_scheduler_timestep_spacing": "a flow schedule has one spacing; --flow_shift bends it",
    "refiner_training": "it names steps of a diffusion schedule; --logit_mean and --logit_std say where flow matching trains",
    "refiner_training_strength": "it goes with --refiner_training",
    "refiner_training_invert_schedule": "it goes with --refiner_training",
}


def _judge(settings: Settings) -> Iterable[str]:
    for name, reason in REFUSED.items():
        if settings[name] not in (OPTIONS[name].default, False):
            yield f"--{name}={show(settings[name])} is not for flow matching: {reason}. Remove it."
    if settings["validation_noise_scheduler"] not in SAMPLERS:
        yield (
            f"--validation_noise_scheduler={settings['validation_noise_scheduler']} samples diffusion models; "
            f"flow matching has {' and '.join(SAMPLERS)}."
        )
    scale = settings["mode_scale"]
    if settings["weighting_scheme"] == "mode" and not -1 <= scale <= STEEPEST_MODE:  # type: ignore[operator]  # a number
        yield f"--mode_scale={scale:g} must lie between -1 and {STEEPEST_MODE:.3f}, or some timesteps would be drawn twice over."


class FlowMatching:
    """The training step of Liu et al. (2023) and Lipman et al. (2023) with the timesteps of Esser et al. (2024).

    x_s = (1 - s) x_0 + s e for s in [0, 1], and the target e - x_0, whose loss has the weight 1 everywhere: what a scheme prefers, it
    draws more often. `scheduler_config` is the model's own (diffusers' names); --flow_shift replaces its shift. The network is told
    1000 s, or as many as the schedule has steps, in float32: bfloat16 would round it to multiples of four.
    """

    facts = Facts(name="flow", title="flow matching", judge=_judge)
    samplers = SAMPLERS

    def __init__(self, options: ObjectiveOptions, scheduler_config: Mapping[str, Any]) -> None:
        self.options = options
        self.scheduler_config = _effective_schedule(options, scheduler_config)
        self.shift = float(self.scheduler_config["shift"])
        self.steps: int = self.scheduler_config["num_train_timesteps"]
        self.identity = {"flow_shift": self.shift}

    def corrupt(self, latents: Tensor, draws: StepDraws) -> Corrupted:
        """latents (B, C, h, w) float32 => what the network sees and should answer, on the latents' device."""
        noise = draws.normal("noise", *latents.shape[1:]).to(latents.device)
        sigmas = self.sigmas(draws).float()
        timesteps = (sigmas * self.steps).to(latents.device)
        share = sigmas.to(latents.device).view(-1, 1, 1, 1)
        return Corrupted(
            noisy=(1 - share) * latents + share * noise,
            timesteps=timesteps,
            target=noise - latents,
            weight=timesteps.new_ones(timesteps.shape),
        )

    def sigmas(self, draws: StepDraws) -> Tensor:
        """(B,) shares of noise in [0, 1], float64: one from each of as many equally likely parts as the global step has samples."""
        return shifted(timesteps(uniform_numbers(self.options, draws), self.options), self.shift)

    def loss(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """(B,) distances over channels and pixels, in float32."""
        return weighted_loss(prediction, corrupted, self.options)


def timesteps(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """Uniform numbers in [0, 1) => timesteps in [0, 1] of --weighting_scheme's distribution; monotone, so that strata stay strata."""
    return SCHEMES[options.weighting_scheme](u, options)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Esser et al. (2024), section 5.3.2: t' = a t / (1 + (a - 1) t), with a = sqrt(m / n) for m pixels in place of n."""
    return shift * t / (1 + (shift - 1) * t)


def _uniform(u: Tensor, options: ObjectiveOptions) -> Tensor:
    return u


def _logit_normal(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """sigmoid(m + s z) of a standard normal z (section 3.1), by the inverse of its distribution function."""
    import torch

    return torch.sigmoid(options.logit_mean + options.logit_std * torch.special.ndtri(u))


def _mode(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """1 - u - s (cos^2(pi u / 2) - 1 + u) (section 3.1, equation 20): above 0, s prefers the middle, below 0 the ends."""
    return 1 - u - options.mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


def _cosmap(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """Of the density 2 / (pi - 2 pi t + 2 pi t^2) (section 3.1, equation 21), by the inverse of its distribution function."""
    return 1 - 1 / ((math.pi / 2 * u).tan() + 1)


SCHEMES: Mapping[str, Callable[[Tensor, ObjectiveOptions], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "mode": _mode,
    "cosmap": _cosmap,
}


def _effective_schedule(options: ObjectiveOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's schedule with the shift that the user set. Raises ConfigError for one that has no shift of its own."""
    schedule = {"num_train_timesteps": 1000, "shift": 1.0, **{key: value for key, value in model.items() if not key.startswith("_")}}
    if options.flow_shift is not None:
        return {**schedule, "shift": options.flow_shift, "use_dynamic_shifting": False}
    if schedule.get("use_dynamic_shifting"):
        raise ConfigError(
            "The model's scheduler shifts its schedule by the size of each picture (use_dynamic_shifting), which cannot be trained: "
            "set --flow_shift; 3 is usual for pictures of a megapixel."
        )
    return schedule
