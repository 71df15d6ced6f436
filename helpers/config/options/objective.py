"""Options of the objective: noise, timesteps and loss."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.config.declare import FROM_HERE, option

SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class ObjectiveOptions:
    """Noise, timesteps and loss: what the network learns to predict, and the weight of each sample."""

    prediction_type: str | None = option(
        None,
        "What the network predicts: the noise (epsilon), the velocity (v_prediction) or the image (sample).",
        choices=("epsilon", "v_prediction", "sample"),
        default_text="what the base model's scheduler says",
        objective="diffusion",
    )
    rescale_betas_zero_snr: bool | None = option(
        None,
        "Zero terminal SNR: the last timestep is pure noise.",
        default_text="what the base model's scheduler says",
        objective="diffusion",
    )
    training_scheduler_timestep_spacing: str = option(
        "trailing",
        "Timestep spacing in the exported scheduler.",
        choices=SPACINGS,
        objective="diffusion",
        needs=(("model_type", ("full",)),),
        on_resume=FROM_HERE,
    )
    inference_scheduler_timestep_spacing: str = option(
        "trailing", "Timestep spacing for validation images.", choices=SPACINGS, objective="diffusion", on_resume=FROM_HERE
    )
    loss: str = option(
        "mse",
        "Distance between prediction and target: the squared error (mse), or the Huber loss, which gives outliers less weight.",
        choices=("mse", "huber"),
    )
    huber_delta: float = option(
        0.1, "Error at which the Huber loss changes from squared to linear.", above=0, needs=(("loss", ("huber",)),)
    )
    loss_weighting: str = option(
        "none",
        "Weight of a sample by its timestep: min_snr (Hang et al., 2023) and soft_min_snr (Crowson et al., 2024), both with --snr_gamma, "
        "or debiased (Yu et al., 2023). See documentation/OBJECTIVES.md.",
        choices=("none", "min_snr", "soft_min_snr", "debiased"),
        objective="diffusion",
    )
    snr_gamma: float | None = option(
        None,
        "Gamma of min-SNR and soft min-SNR, usually 5. Setting it implies --loss_weighting=min_snr; 0 turns it off.",
        env="MIN_SNR_GAMMA",
        at_least=0,
        objective="diffusion",
    )
    use_soft_min_snr: bool = option(False, "Same as --loss_weighting=soft_min_snr.", alias_of=("loss_weighting", "soft_min_snr"))
    soft_min_snr_sigma_data: float | None = option(
        None,
        "Standard deviation of the data, which sets the gamma of soft min-SNR: 1 / sigma_data^2.",
        above=0,
        default_text="from --snr_gamma",
        objective="diffusion",
        needs=(("loss_weighting", ("soft_min_snr",)),),
    )
    snr_weight: float = option(
        1.0, "Factor of the loss if --loss_weighting is none.", above=0, objective="diffusion", needs=(("loss_weighting", ("none",)),)
    )
    offset_noise: bool = option(False, "Add a constant offset to the noise of each channel.", objective="diffusion")
    noise_offset: float = option(
        0.1, "Strength of the offset noise.", at_least=0, objective="diffusion", needs=(("offset_noise", (True,)),)
    )
    noise_offset_probability: float = option(
        0.25, "Share of the steps that have offset noise.", at_least=0, at_most=1, objective="diffusion", needs=(("offset_noise", (True,)),)
    )
    input_perturbation: float = option(
        0.0, "Strength of additional noise in the network's input that is not in its target.", at_least=0, objective="diffusion"
    )
    timestep_bias_strategy: str = option(
        "none",
        "Train some timesteps more often: earlier ones (little noise), later ones (much noise), or a range.",
        choices=("earlier", "later", "range", "none"),
        objective="diffusion",
    )
    timestep_bias_multiplier: float = option(
        1.0,
        "How many times as often these timesteps are trained; below 1, less often.",
        above=0,
        objective="diffusion",
        needs=(("timestep_bias_strategy", ("earlier", "later", "range")),),
    )
    timestep_bias_portion: float = option(
        0.25,
        "With earlier and later: the share of the timesteps that is meant.",
        at_least=0,
        at_most=1,
        objective="diffusion",
        needs=(("timestep_bias_strategy", ("earlier", "later")),),
    )
    timestep_bias_begin: int = option(
        0, "With range: the first timestep.", at_least=0, objective="diffusion", needs=(("timestep_bias_strategy", ("range",)),)
    )
    timestep_bias_end: int = option(
        1000,
        "With range: the end of the range, exclusive.",
        at_least=1,
        objective="diffusion",
        needs=(("timestep_bias_strategy", ("range",)),),
    )
    disable_segmented_timestep_sampling: bool = option(
        False,
        "Draw timesteps independently. By default they are stratified: of N samples in a step, each gets a timestep from another of N "
        "equally likely parts.",
    )
    refiner_training: bool = option(
        False,
        "Train only the timesteps with little noise, as for a refiner or one of two experts.",
        objective="diffusion",
    )
    refiner_training_strength: float = option(
        0.2,
        "Share of the timesteps that --refiner_training trains: 0.2 is timesteps 0 to 199 of 1000.",
        above=0,
        at_most=1,
        objective="diffusion",
    )
    refiner_training_invert_schedule: bool = option(
        False, "With --refiner_training: train all other timesteps instead, as for the other expert.", objective="diffusion"
    )
    weighting_scheme: str = option(
        "logit_normal",
        "Flow matching: distribution of the timesteps (Esser et al., 2024). sigma_sqrt is the same as uniform: it weights the error of the "
        "image by 1 / sigma^2, which is the unweighted error of the velocity.",
        choices=("logit_normal", "mode", "cosmap", "uniform"),
        synonyms={"sigma_sqrt": "uniform", "none": "uniform"},
        objective="flow",
    )
    logit_mean: float = option(
        0.0,
        "With logit_normal: timesteps are sigmoid(logit_mean + logit_std z), with z standard normal. Above 0 prefers noisy timesteps.",
        objective="flow",
        needs=(("weighting_scheme", ("logit_normal",)),),
    )
    logit_std: float = option(
        1.0,
        "With logit_normal: smaller values prefer the middle of the schedule.",
        above=0,
        objective="flow",
        needs=(("weighting_scheme", ("logit_normal",)),),
    )
    mode_scale: float = option(
        1.29,
        "With mode, from -1 to 1.752: above 0 prefers the middle of the schedule, below 0 its ends.",
        objective="flow",
        needs=(("weighting_scheme", ("mode",)),),
    )
    flow_shift: float | None = option(
        None,
        "Flow matching: shift a of the timesteps, t => a t / (1 + (a - 1) t); above 1 towards noise. The exported scheduler has it too.",
        above=0,
        at_most=100,
        default_text="what the base model's scheduler says",
        objective="flow",
    )
