"""Denoising diffusion: the network answers with the noise (epsilon) or the velocity of a discrete, variance-preserving schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.config.options import OPTIONS
from helpers.errors import ConfigError
from helpers.protocols import Corrupted

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.data.draws import StepDraws


SAMPLERS: Mapping[str, str] = {
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def _judge(settings: Settings) -> Iterable[str]:
    zero_snr = settings["rescale_betas_zero_snr"]
    if zero_snr and settings["prediction_type"] == "epsilon":
        yield (
            "--rescale_betas_zero_snr needs --prediction_type=v_prediction: at the last timestep there is only noise, "
            "and a network that answers with the noise has nothing to learn there."
        )
    if settings["refiner_training"]:
        if settings["sdxl_refiner_uses_full_range"]:
            yield "--refiner_training and --sdxl_refiner_uses_full_range exclude each other; remove one."
        if settings["refiner_training_invert_schedule"] and settings["refiner_training_strength"] == 1:
            yield "--refiner_training_invert_schedule leaves nothing of a --refiner_training_strength of 1; lower it."
    else:
        for name in ("refiner_training_strength", "refiner_training_invert_schedule"):
            if settings[name] != OPTIONS[name].default:
                yield f"--{name} needs --refiner_training."


class Diffusion:
    """The training step of Ho et al. (2020) with the corrections published since.

    `scheduler_config` is the model's own noise schedule (diffusers' names); options that the user set replace its entries.
    x_t = a_t x_0 + s_t e with a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t), all coefficients in float32 whatever the network's
    precision: in bfloat16 the first steps of the schedule would add no noise at all.
    """

    facts = Facts(name="diffusion", title="diffusion", judge=_judge)
    samplers = SAMPLERS

    def __init__(self, options: ObjectiveOptions, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        self.options = options
        self.scheduler_config = _effective_schedule(options, scheduler_config)
        self.prediction_type: str = self.scheduler_config["prediction_type"]
        self.identity = {name: self.scheduler_config[name] for name in ("prediction_type", "rescale_betas_zero_snr")}
        self.alphas_cumprod: Tensor = DDPMScheduler.from_config(dict(self.scheduler_config)).alphas_cumprod.float()
        self.timesteps = trained_timesteps(options, len(self.alphas_cumprod))

    def corrupt(self, latents: Tensor, draws: StepDraws) -> Corrupted:
        """latents (B, C, h, w) float32 => what the network sees and should answer, on the latents' device."""
        device = latents.device
        noise = self._noise(latents, draws)
        timesteps = self._timesteps(draws)
        signal, sigma = self._coefficients(timesteps)
        signal, sigma = signal.to(device), sigma.to(device)
        perturbed = noise
        if self.options.input_perturbation:
            # Ning et al. (2023): only what the network sees is perturbed; the answer stays the clean noise.
            perturbed = noise + self.options.input_perturbation * draws.normal("input_perturbation", *latents.shape[1:]).to(device)
        return Corrupted(
            noisy=signal * latents + sigma * perturbed,
            timesteps=timesteps.to(device),
            target=noise if self.prediction_type == "epsilon" else signal * noise - sigma * latents,
            weight=self._weight(timesteps).to(device),
        )

    def loss(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """(B,) mean squared error over channels and pixels, times the sample's weight, in float32."""
        squared_error = (prediction.float() - corrupted.target.float()) ** 2
        return squared_error.mean(dim=tuple(range(1, squared_error.ndim))) * corrupted.weight

    def _noise(self, latents: Tensor, draws: StepDraws) -> Tensor:
        channels, *spatial = latents.shape[1:]
        noise = draws.normal("noise", channels, *spatial)
        if self.options.offset_noise and draws.step_uniform("offset_noise") < self.options.noise_offset_probability:
            noise = noise + self.options.noise_offset * draws.normal("noise_offset", channels, *(1 for _ in spatial))
        return noise.to(latents.device)

    def _timesteps(self, draws: StepDraws) -> Tensor:
        """(B,) integers of the trained ones: one from each of as many equal strata as the global step has samples."""
        return self.timesteps.start + (draws.strata("timestep") * len(self.timesteps)).long()

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def _weight(self, timesteps: Tensor) -> Tensor:
        if self.options.loss_weighting == "min_snr":
            assert self.options.snr_gamma is not None
            return min_snr_weight(self.alphas_cumprod[timesteps].double(), self.options.snr_gamma, self.prediction_type).float()
        return self.alphas_cumprod.new_full(timesteps.shape, self.options.snr_weight)


def trained_timesteps(options: ObjectiveOptions, total: int) -> range:
    """The timesteps of a schedule of `total` that are drawn from: all of them, or those that one of two experts is for.

    Both experts of one strength share the schedule without overlap or gap. Raises ConfigError when nothing is left to train.
    """
    if not options.refiner_training or options.sdxl_refiner_uses_full_range:
        return range(total)
    border = round(options.refiner_training_strength * total)
    timesteps = range(border, total) if options.refiner_training_invert_schedule else range(border)
    if not timesteps:
        raise ConfigError(f"--refiner_training_strength={options.refiner_training_strength:g} leaves no timestep of {total} to train on.")
    return timesteps


def min_snr_weight(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weight of Hang et al. (2023), section 3.4: min(SNR, gamma) / SNR, and / (SNR + 1) for the velocity.

    SNR = abar / (1 - abar). Written without dividing by SNR or by 1 - abar, so that it is exact at both ends of the schedule:
    0 for the velocity where only noise is left. For epsilon that end has no limit; zero terminal SNR refuses epsilon.
    """
    noise = 1 - alphas_cumprod
    capped = alphas_cumprod.minimum(gamma * noise)  # min(SNR, gamma) * (1 - abar)
    if prediction_type == "v_prediction":
        return capped  # divided by (SNR + 1) * (1 - abar) = 1
    return capped / alphas_cumprod


def _effective_schedule(options: ObjectiveOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's schedule with what the user set put in; refuses what cannot be learnt."""
    schedule = {key: value for key, value in model.items() if not key.startswith("_")}
    schedule["prediction_type"] = options.prediction_type or schedule.get("prediction_type", "epsilon")
    if options.rescale_betas_zero_snr is not None:
        schedule["rescale_betas_zero_snr"] = options.rescale_betas_zero_snr
    schedule.setdefault("rescale_betas_zero_snr", False)
    schedule["timestep_spacing"] = options.training_scheduler_timestep_spacing
    if schedule["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ConfigError(f"The model predicts {schedule['prediction_type']!r}, and only epsilon and v_prediction can be trained.")
    if schedule["rescale_betas_zero_snr"] and schedule["prediction_type"] == "epsilon":
        raise ConfigError(
            "The model's schedule ends in pure noise (rescale_betas_zero_snr), which epsilon prediction cannot learn: "
            "set --prediction_type=v_prediction."
        )
    return schedule
