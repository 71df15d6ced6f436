"""Which loss moves the weights."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.config.declare import FROM_HERE, option

SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class ObjectiveOptions:
    """Noise, timesteps and loss: what the network is asked to predict, and how much each sample counts."""

    prediction_type: str | None = option(
        None,
        "What the network predicts: the noise, the velocity, or the picture (sample).",
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
        "Timestep spacing of the training and the exported scheduler.",
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
        "Distance between prediction and target: the squared error, or one that is linear for large errors, so that outliers weigh less.",
        choices=("mse", "huber"),
    )
    huber_delta: float = option(
        0.1, "Where the Huber loss turns from square to linear; below, it is the squared error.", above=0, needs=(("loss", ("huber",)),)
    )
    loss_weighting: str = option(
        "none",
        "Weight of a sample by its timestep: min_snr is Hang et al. (2023), soft_min_snr the same without a corner (Crowson et al., 2024),"
        " both with --snr_gamma; debiased is Yu et al. (2023). See documentation/OBJECTIVES.md.",
        choices=("none", "min_snr", "soft_min_snr", "debiased"),
        objective="diffusion",
    )
    snr_gamma: float | None = option(
        None,
        "Gamma of min-SNR and soft min-SNR, usually 5; implies --loss_weighting=min_snr. 0 turns it off.",
        env="MIN_SNR_GAMMA",
        at_least=0,
        objective="diffusion",
    )
    use_soft_min_snr: bool = option(False, "Same as --loss_weighting=soft_min_snr.", alias_of=("loss_weighting", "soft_min_snr"))
    soft_min_snr_sigma_data: float | None = option(
        None,
        "Standard deviation of the data, another way to say the gamma of soft min-SNR: 1 / sigma_data^2.",
        above=0,
        default_text="--snr_gamma says it",
        objective="diffusion",
        needs=(("loss_weighting", ("soft_min_snr",)),),
    )
    snr_weight: float = option(
        1.0, "Factor on the loss where --loss_weighting is none.", above=0, objective="diffusion", needs=(("loss_weighting", ("none",)),)
    )
    offset_noise: bool = option(False, "Add a constant offset to the noise of each channel.", objective="diffusion")
    noise_offset: float = option(
        0.1, "Strength of the offset noise.", at_least=0, objective="diffusion", needs=(("offset_noise", (True,)),)
    )
    noise_offset_probability: float = option(
        0.25, "Chance that a step gets offset noise.", at_least=0, at_most=1, objective="diffusion", needs=(("offset_noise", (True,)),)
    )
    input_perturbation: float = option(
        0.0, "Extra noise that only the network's input gets, not its target.", at_least=0, objective="diffusion"
    )
    timestep_bias_strategy: str = option(
        "none",
        "Draw one part of the timesteps more often: the earlier ones, of little noise, the later ones, or a range.",
        choices=("earlier", "later", "range", "none"),
        objective="diffusion",
    )
    timestep_bias_multiplier: float = option(
        1.0,
        "How much more often; below 1, less often.",
        above=0,
        objective="diffusion",
        needs=(("timestep_bias_strategy", ("earlier", "later", "range")),),
    )
    timestep_bias_portion: float = option(
        0.25,
        "With earlier and later: size of that part, as a share of the timesteps that are trained.",
        at_least=0,
        at_most=1,
        objective="diffusion",
        needs=(("timestep_bias_strategy", ("earlier", "later")),),
    )
    timestep_bias_begin: int = option(
        0, "With range: its first timestep.", at_least=0, objective="diffusion", needs=(("timestep_bias_strategy", ("range",)),)
    )
    timestep_bias_end: int = option(
        1000, "With range: the timestep after its last.", at_least=1, objective="diffusion", needs=(("timestep_bias_strategy", ("range",)),)
    )
    disable_segmented_timestep_sampling: bool = option(
        False, "Draw each timestep by itself, not one from each of as many equally likely parts as a step has samples."
    )
    refiner_training: bool = option(
        False,
        "Train on the low-noise end of the schedule only: a refiner, or one of two experts.",
        objective="diffusion",
    )
    refiner_training_strength: float = option(
        0.2, "Size of that end: 0.2 is timesteps 0 to 199 of 1000. With --refiner_training.", above=0, at_most=1, objective="diffusion"
    )
    refiner_training_invert_schedule: bool = option(
        False, "Train on all but that end: the expert for the rest of the schedule. With --refiner_training.", objective="diffusion"
    )
    weighting_scheme: str = option(
        "logit_normal",
        "Flow matching: which timesteps are drawn more often (Esser et al., 2024). sigma_sqrt weighs the error of the picture by 1/sigma^2,"
        " which is the error of the velocity as it is: uniform.",
        choices=("logit_normal", "mode", "cosmap", "uniform"),
        synonyms={"sigma_sqrt": "uniform", "none": "uniform"},
        objective="flow",
    )
    logit_mean: float = option(
        0.0,
        "With logit_normal: timesteps are sigmoid(logit_mean + logit_std z), z standard normal; above 0 is noisier.",
        objective="flow",
        needs=(("weighting_scheme", ("logit_normal",)),),
    )
    logit_std: float = option(
        1.0,
        "With logit_normal: smaller keeps closer to the middle.",
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
        "Flow matching: timesteps t become a t / (1 + (a - 1) t), towards noise above 1. The exported scheduler has it too.",
        above=0,
        at_most=100,
        default_text="what the base model's scheduler says",
        objective="flow",
    )
