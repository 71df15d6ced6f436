"""Flow matching along straight lines (rectified flow). The network predicts the velocity from the image to the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.objectives.losses import weighted_loss
from helpers.objectives.timesteps import uniform_numbers
from helpers.protocols import Corrupted

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.data.base.draws import StepDraws

LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # above it, or below -1, the function of mode sampling is not monotone
# Of FlowMatchEulerDiscreteScheduler, where a base model's scheduler does not say otherwise.
DYNAMIC: Mapping[str, Any] = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
DEFAULTS: Mapping[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, **DYNAMIC}
SAMPLERS: Mapping[str, str] = {"euler": "FlowMatchEulerDiscreteScheduler"}
# Options of diffusion => why flow matching does not have them, and what to use instead.
INSTEAD: Mapping[str, str] = {
    "prediction_type": "flow matching always predicts the velocity, noise - image",
    "rescale_betas_zero_snr": "the schedule of flow matching always ends in pure noise",
    "loss_weighting": "it weights timesteps of a diffusion schedule; use --weighting_scheme",
    "snr_gamma": "it weights timesteps of a diffusion schedule; use --weighting_scheme",
    "snr_weight": "it scales the loss; change --learning_rate",
    "offset_noise": "flow matching can already generate images of any brightness",
    "timestep_bias_strategy": "it selects timesteps of a diffusion schedule; use --weighting_scheme and --logit_mean",
    "training_scheduler_timestep_spacing": "a flow schedule has only one spacing; use --flow_shift",
    "inference_scheduler_timestep_spacing": "a flow schedule has only one spacing; use --flow_shift",
    "refiner_training": "it selects timesteps of a diffusion schedule; use --logit_mean and --logit_std",
}


def _judge(settings: Settings) -> Iterable[str]:
    if settings["validation_noise_scheduler"] not in SAMPLERS:
        yield (
            f"--validation_noise_scheduler={settings['validation_noise_scheduler']} is for diffusion models; "
            f"flow matching needs {' or '.join(SAMPLERS)}."
        )
    scale = settings["mode_scale"]
    if settings["weighting_scheme"] == "mode" and not -1 <= scale <= LARGEST_MODE_SCALE:  # type: ignore[operator]  # a number
        yield f"--mode_scale={scale:g} must lie between -1 and {LARGEST_MODE_SCALE:.3f}: beyond that, timesteps are no longer in order."


class FlowMatching:
    """The training step of Liu et al. (2023) and Lipman et al. (2023), with the timestep distributions of Esser et al. (2024).

    The network sees x_s = (1 - s) x_0 + s e and learns e - x_0: x_0 are the latents, e is the noise, s in [0, 1] is the noise level. All
    losses have weight 1; a --weighting_scheme draws the timesteps it prefers more often. The network's timestep is s times the number of
    steps of the schedule (1000), in float32: bfloat16 would round it to multiples of 4.

    `scheduler_config` is the base model's (diffusers' names). --flow_shift replaces its shift. Where it says `use_dynamic_shifting`, the
    shift depends on the number of tokens of the image, squares of `patch` x `patch` latent pixels (`dynamic_shift`).
    """

    facts = Facts(name="flow", title="flow matching", judge=_judge, instead=INSTEAD)
    samplers = SAMPLERS

    def __init__(self, options: ObjectiveOptions, scheduler_config: Mapping[str, Any], patch: int = 1) -> None:
        self.options = options
        self.scheduler_config = _effective_schedule(options, scheduler_config)
        self.patch = patch
        self.steps: int = self.scheduler_config["num_train_timesteps"]
        self.dynamic: bool = self.scheduler_config["use_dynamic_shifting"]
        self.identity = {"flow_shift": {name: self.scheduler_config[name] for name in DYNAMIC} if self.dynamic else self.shift(0)}

    def corrupt(self, latents: Tensor, draws: StepDraws) -> Corrupted:
        """latents (B, C, h, w), float32 => the network's input and target, on the same device."""
        noise = draws.normal("noise", *latents.shape[1:]).to(latents.device)
        tokens = (latents.shape[2] // self.patch) * (latents.shape[3] // self.patch)
        sigmas = self.sigmas(draws, tokens).float()
        timesteps = (sigmas * self.steps).to(latents.device)
        share = sigmas.to(latents.device).view(-1, 1, 1, 1)
        return Corrupted(
            noisy=(1 - share) * latents + share * noise,
            timesteps=timesteps,
            target=noise - latents,
            weight=timesteps.new_ones(timesteps.shape),
        )

    def sigmas(self, draws: StepDraws, tokens: int = 0) -> Tensor:
        """(B,) noise levels in [0, 1] for images of so many tokens, float64, stratified over the step's samples (`uniform_numbers`)."""
        return shifted(timesteps(uniform_numbers(self.options, draws), self.options), self.shift(tokens))

    def shift(self, tokens: int) -> float:
        """The schedule's shift for an image of so many tokens."""
        return dynamic_shift(self.scheduler_config, tokens) if self.dynamic else float(self.scheduler_config["shift"])

    def loss(self, prediction: Tensor, corrupted: Corrupted, mask: Tensor | None = None) -> Tensor:
        """(B,) mean distances over channels and pixels, weighted by the mask, float32."""
        return weighted_loss(prediction, corrupted, self.options, mask)


def timesteps(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """Uniform numbers in [0, 1) => timesteps in [0, 1], distributed by --weighting_scheme. Monotone, which keeps the strata."""
    return SCHEMES[options.weighting_scheme](u, options)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Esser et al. (2024), section 5.3.2: t' = a t / (1 + (a - 1) t), with a = sqrt(m / n) to go from n pixels to m."""
    return shift * t / (1 + (shift - 1) * t)


def dynamic_shift(schedule: Mapping[str, Any], tokens: int) -> float:
    """The shift for an image of so many tokens, as diffusers' pipelines of FLUX.1 and their scheduler calculate it.

    exp(mu), or mu itself where `time_shift_type` is "linear". mu is linear in the number of tokens, from `base_shift` at
    `base_image_seq_len` to `max_shift` at `max_image_seq_len`.
    """
    slope = (schedule["max_shift"] - schedule["base_shift"]) / (schedule["max_image_seq_len"] - schedule["base_image_seq_len"])
    mu = schedule["base_shift"] + slope * (tokens - schedule["base_image_seq_len"])
    return mu if schedule["time_shift_type"] == "linear" else math.exp(mu)


def _uniform(u: Tensor, options: ObjectiveOptions) -> Tensor:
    return u


def _logit_normal(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """sigmoid(m + s z) for a standard normal z (section 3.1); z is the inverse of the normal distribution function at u."""
    import torch

    return torch.sigmoid(options.logit_mean + options.logit_std * torch.special.ndtri(u))


def _mode(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """1 - u - s (cos^2(pi u / 2) - 1 + u) (section 3.1, equation 20). s > 0 prefers the middle, s < 0 the ends."""
    return 1 - u - options.mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


def _cosmap(u: Tensor, options: ObjectiveOptions) -> Tensor:
    """Density 2 / (pi - 2 pi t + 2 pi t^2) (section 3.1, equation 21), by the inverse of its distribution function at u."""
    return 1 - 1 / ((math.pi / 2 * u).tan() + 1)


SCHEMES: Mapping[str, Callable[[Tensor, ObjectiveOptions], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "mode": _mode,
    "cosmap": _cosmap,
}


def _effective_schedule(options: ObjectiveOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's schedule with the defaults of its class in diffusers, and with the shift that the user set."""
    schedule = {**DEFAULTS, **{key: value for key, value in model.items() if not key.startswith("_")}}
    if options.flow_shift is not None:
        return {**schedule, "shift": options.flow_shift, "use_dynamic_shifting": False}
    return schedule
