"""Denoising diffusion on a discrete, variance-preserving schedule. The network predicts the noise, the velocity or the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.config.options import OPTIONS
from helpers.errors import ConfigError
from helpers.objectives.losses import weighted_loss
from helpers.objectives.timesteps import TimestepDistribution, uniform_numbers
from helpers.objectives.weights import loss_weight
from helpers.protocols import Corrupted

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.data.base.draws import StepDraws


SAMPLERS: Mapping[str, str] = {
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
NOT_FOR_SAMPLE = frozenset({"euler-a"})  # samplers whose diffusers class cannot use an image prediction
# A larger weight would drown out all other timesteps: the debiased weight of epsilon grows without limit towards pure noise.
LARGEST_WEIGHT = 1000.0
OFFSET_WITH_ZERO_SNR = (
    "--offset_noise cannot be used with zero terminal SNR, which already allows dark and bright images, and whose sampling starts from "
    "noise without an offset. Remove --offset_noise."
)


def _judge(settings: Settings) -> Iterable[str]:
    zero_snr = settings["rescale_betas_zero_snr"]
    if zero_snr and settings["prediction_type"] == "epsilon":
        yield (
            "--rescale_betas_zero_snr needs --prediction_type=v_prediction: its last timestep is pure noise, "
            "where a network that predicts the noise has nothing to learn."
        )
    if zero_snr and settings["offset_noise"]:
        yield OFFSET_WITH_ZERO_SNR
    sampler = settings["validation_noise_scheduler"]
    if settings["prediction_type"] == "sample" and sampler in NOT_FOR_SAMPLE:
        yield f"--validation_noise_scheduler={sampler} cannot sample with --prediction_type=sample; use another, such as euler."
    yield from _judge_experts(settings)
    yield from _judge_bias(settings)


def _judge_experts(settings: Settings) -> Iterable[str]:
    if settings["refiner_training"]:
        if settings["refiner_training_invert_schedule"] and settings["refiner_training_strength"] == 1:
            yield "--refiner_training_invert_schedule with --refiner_training_strength=1 leaves no timestep to train; lower it."
    else:
        for name in ("refiner_training_strength", "refiner_training_invert_schedule"):
            if settings[name] != OPTIONS[name].default:
                yield f"--{name} needs --refiner_training."


def _judge_bias(settings: Settings) -> Iterable[str]:
    strategy, portion = settings["timestep_bias_strategy"], settings["timestep_bias_portion"]
    begin, end = settings["timestep_bias_begin"], settings["timestep_bias_end"]
    if strategy == "none":
        return
    if settings["timestep_bias_multiplier"] == 1:
        yield f"--timestep_bias_strategy={strategy} needs a --timestep_bias_multiplier other than 1; 2 draws them twice as often."
    if strategy in ("earlier", "later") and portion in (0, 1):
        yield f"--timestep_bias_portion={portion:g} is {'all' if portion else 'nothing'} of the schedule; 0.25 is a quarter of it."
    if strategy == "range" and begin >= end:  # type: ignore[operator]  # numbers
        yield f"--timestep_bias_begin={begin} is not below --timestep_bias_end={end}; swap them."


class Diffusion:
    """The training step of Ho et al. (2020), with optional corrections published since.

    The network sees x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e: x_0 are the latents, e is the noise, abar_t is the schedule's cumulative
    product of alphas. Coefficients are float32 at any precision of the network: in bfloat16 the first timesteps would add no noise at all.

    `scheduler_config` is the base model's noise schedule (diffusers' names). Options that the user set replace its entries.
    """

    facts = Facts(name="diffusion", title="diffusion", judge=_judge)

    def __init__(self, options: ObjectiveOptions, scheduler_config: Mapping[str, Any], patch: int = 1) -> None:
        from diffusers import DDPMScheduler

        self.options = options
        self.scheduler_config = _effective_schedule(options, scheduler_config)
        self.prediction_type: str = self.scheduler_config["prediction_type"]
        self.identity = {name: self.scheduler_config[name] for name in ("prediction_type", "rescale_betas_zero_snr")}
        self.alphas_cumprod: Tensor = DDPMScheduler.from_config(dict(self.scheduler_config)).alphas_cumprod.float()
        self.samplers = {name: kind for name, kind in SAMPLERS.items() if self.prediction_type != "sample" or name not in NOT_FOR_SAMPLE}
        self.distribution = TimestepDistribution(options, len(self.alphas_cumprod))
        self._refuse_weights_without_limit()

    def corrupt(self, latents: Tensor, draws: StepDraws) -> Corrupted:
        """latents (B, C, h, w), float32 => the network's input and target, on the same device."""
        device = latents.device
        noise = self._noise(latents, draws)
        timesteps = self._timesteps(draws)
        signal, sigma = self._coefficients(timesteps)
        signal, sigma = signal.to(device), sigma.to(device)
        perturbed = noise
        if self.options.input_perturbation:
            # Ning et al. (2023): the network's input is perturbed, the target is not.
            perturbed = noise + self.options.input_perturbation * draws.normal("input_perturbation", *latents.shape[1:]).to(device)
        return Corrupted(
            noisy=signal * latents + sigma * perturbed,
            timesteps=timesteps.to(device),
            target=self._target(latents, noise, signal, sigma),
            weight=self._weight(timesteps).to(device),
        )

    def loss(self, prediction: Tensor, corrupted: Corrupted, mask: Tensor | None = None) -> Tensor:
        """(B,) mean distances over channels and pixels, weighted by the mask, times each sample's weight, float32."""
        return weighted_loss(prediction, corrupted, self.options, mask)

    def _target(self, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction_type == "sample":
            return latents
        return noise if self.prediction_type == "epsilon" else signal * noise - sigma * latents

    def _noise(self, latents: Tensor, draws: StepDraws) -> Tensor:
        channels, *spatial = latents.shape[1:]
        noise = draws.normal("noise", channels, *spatial)
        if self.options.offset_noise and draws.step_uniform("offset_noise") < self.options.noise_offset_probability:
            noise = noise + self.options.noise_offset * draws.normal("noise_offset", channels, *(1 for _ in spatial))
        return noise.to(latents.device)

    def _timesteps(self, draws: StepDraws) -> Tensor:
        """(B,) integers, stratified over all samples of the step (`uniform_numbers`)."""
        return self.distribution.at(uniform_numbers(self.options, draws))

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def _weight(self, timesteps: Tensor) -> Tensor:
        options = self.options
        if options.loss_weighting == "none":
            return self.alphas_cumprod.new_full(timesteps.shape, options.snr_weight)
        kept = self.alphas_cumprod[timesteps].double()
        return loss_weight(options.loss_weighting, kept, options.snr_gamma, self.prediction_type).float()

    def _refuse_weights_without_limit(self) -> None:
        import torch

        trained, weighting = self.distribution.interval, self.options.loss_weighting
        largest = self._weight(torch.tensor([trained.start, trained.stop - 1])).max().item()
        if weighting != "none" and not largest <= LARGEST_WEIGHT:  # not a number, either
            raise ConfigError(
                f"--loss_weighting={weighting} with {self.prediction_type} gives one end of this model's schedule a weight of "
                f"{largest:,.0f}, which would drown out all other timesteps; use --loss_weighting=min_snr or soft_min_snr."
            )


def _effective_schedule(options: ObjectiveOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's schedule with the user's options. Raises ConfigError for combinations that cannot be trained."""
    if "beta_schedule" not in model:
        raise ConfigError(
            f"The model's scheduler, {model.get('_class_name')}, has no betas: the model was trained by another method, such as EDM or "
            "flow matching, and training it as a diffusion model would ruin it. Choose another base model."
        )
    schedule = {key: value for key, value in model.items() if not key.startswith("_")}
    schedule["prediction_type"] = options.prediction_type or schedule.get("prediction_type", "epsilon")
    if options.rescale_betas_zero_snr is not None:
        schedule["rescale_betas_zero_snr"] = options.rescale_betas_zero_snr
    schedule.setdefault("rescale_betas_zero_snr", False)
    schedule["timestep_spacing"] = options.training_scheduler_timestep_spacing
    known = OPTIONS["prediction_type"].choices
    if schedule["prediction_type"] not in known:
        predicted = schedule["prediction_type"]
        raise ConfigError(f"The model predicts {predicted!r}, and only {', '.join(known)} can be trained; choose another base model.")
    if schedule["rescale_betas_zero_snr"] and schedule["prediction_type"] == "epsilon":
        if options.rescale_betas_zero_snr:
            raise ConfigError(
                "--rescale_betas_zero_snr cannot be used with a model that predicts the noise (epsilon), which has nothing to learn where "
                "there is only noise: remove it, or train the model to predict the velocity with --prediction_type=v_prediction."
            )
        raise ConfigError(
            "The model's schedule ends in pure noise (rescale_betas_zero_snr), where a model that predicts the noise (epsilon) has nothing "
            "to learn: set --prediction_type=v_prediction."
        )
    if schedule["rescale_betas_zero_snr"] and options.offset_noise:
        raise ConfigError(OFFSET_WITH_ZERO_SNR)
    return schedule
