"""How a run advances: length, precision, optimiser, learning rate, average, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.config.declare import FROM_HERE, ROUNDING, AnyBut, Needs, option
from helpers.config.optimizers import ADAMW_DEFAULTS, NAMES, check_class

LARGEST_SEED = 2**32 - 1
LENGTH = ", so the run gets another length"
PRODIGY: Needs = (("optimizer", ("prodigy",)),)
EMA: Needs = (("use_ema", (True,)),)
SCHEDULES = ("linear", "sine", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class RunOptions:
    """Run: where it writes, how long it lasts, in what precision."""

    output_dir: Path = option(Path("simpletuner-results"), "Folder that everything is written to.", on_resume=FROM_HERE)
    demo: str | None = option(
        None, "Train the embedded demo; --demo=photos trains on its photographs.", env=(), choices=("lora", "photos"), on_resume=FROM_HERE
    )
    seed: int = option(
        42,
        "Order, noise and draws are computed from it. 0 or -1 draws one at the start of a run.",
        env="TRAINING_SEED",
        at_least=-1,
        at_most=LARGEST_SEED,
    )
    max_train_steps: int | None = option(
        None, "Optimiser steps. Give this or --num_train_epochs, not both.", env="MAX_NUM_STEPS", at_least=0, on_resume=LENGTH
    )
    num_train_epochs: int = option(1, "Passes over the data.", env="NUM_EPOCHS", at_least=0, on_resume=LENGTH)
    max_train_seconds: float | None = option(
        None,
        "Seconds from the start of the program, encoding included, after which it finishes the step, saves, and ends with exit code 75. "
        "The next start has as many again.",
        above=0,
        on_resume=FROM_HERE,
    )
    gradient_accumulation_steps: int = option(
        4,
        "Micro-batches of each process in one optimiser step.",
        at_least=1,
        on_resume=" from step {step} on, so that a step keeps its micro-batches on the present number of processes",
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute activations twice instead of keeping them: less memory, more time.",
        env="USE_GRADIENT_CHECKPOINTING",
        on_resume=ROUNDING,
    )
    mixed_precision: str = option(
        "bf16", "Precision of the network's arithmetic. On a CPU bf16 becomes no.", choices=("bf16", "fp16", "no")
    )
    allow_tf32: bool = option(False, "Let fp32 matrix products use TF32 on NVIDIA GPUs.", on_resume=ROUNDING)
    accelerator_cache_clear_interval: int | None = option(
        None, "Empty the accelerator's memory cache every so many steps.", at_least=1, on_resume=FROM_HERE
    )
    attention: str = option(
        "auto",
        "PyTorch's kernel for attention: the best that fits (auto), or one (flash, efficient, cudnn), with math where that does not fit.",
        choices=("auto", "flash", "efficient", "cudnn", "math"),
        on_resume=ROUNDING,
    )
    unet_attention_slice: bool = option(
        False,
        "Compute the attention of a U-Net in slices, for less memory where PyTorch has no lean kernel (Apple).",
        some_families=True,
        on_resume=ROUNDING,
    )
    gradient_precision: str = option(
        "unmodified",
        "Precision that the gradients of a step's micro-batches add up in: the weights' own (unmodified), or fp32 for bf16 weights too.",
        choices=("unmodified", "fp32"),
    )
    channels_last: bool = option(
        False,
        "Keep the weights of convolutions with their channels last, which is faster on many GPUs.",
        some_families=True,
        on_resume=ROUNDING,
    )
    base_quantization: str = option(
        "none",
        "Keep the weights of a base model that stands still in 8 bits (int8, fp8) or 4 (nf4), beside adapters of any kind; "
        "see documentation/MEMORY.md.",
        choices=("none", "int8", "nf4", "fp8"),
    )
    offload_param_path: Path | None = option(None, "Folder for DeepSpeed's parameter offload to NVMe.", not_yet=True, on_resume=FROM_HERE)
    plan: bool = option(False, "Tell what the run would do, and stop.", env=(), not_yet=True, on_resume=FROM_HERE)
    rehearse: bool = option(False, "Go through every stage of the run in small, and stop.", env=(), not_yet=True, on_resume=FROM_HERE)
    dataset_report: bool = option(
        False, "Scan and plan the data, write OUTPUT_DIR/dataset_report.html and .json, and stop.", env=(), on_resume=FROM_HERE
    )


def _in_adamw(name: str) -> str:
    return f"{ADAMW_DEFAULTS[name]:g} for variants of AdamW, otherwise the optimizer's own"


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer: how a gradient becomes a step."""

    optimizer: str = option(
        "auto",
        "The optimizer, by one of these names, or any other of an installed library by its class: module:Class. See"
        " documentation/OPTIMIZERS.md.",
        choices=NAMES,
        check_other=check_class,
        names_code=True,
        synonyms={"adamw_stochastic": "adamw_bf16"},
        default_text="adamw_bf16 where bf16 weights are trained, else adamw",
    )
    optimizer_args: str | None = option(
        None, "More arguments of the optimiser, as its library names them: 'betas=0.9,0.99 weight_decay=0.1'.", default_text="its own"
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Keep the optimiser's state in the CPU's memory and take its step there: less memory of the accelerator, more time.",
        on_resume=ROUNDING,
    )
    adam_bfloat16: bool = option(False, "Same as --optimizer=adamw_bf16.", alias_of=("optimizer", "adamw_bf16"))
    use_8bit_adam: bool = option(False, "Same as --optimizer=adamw8bit.", alias_of=("optimizer", "adamw8bit"))
    use_adafactor_optimizer: bool = option(False, "Same as --optimizer=adafactor.", alias_of=("optimizer", "adafactor"))
    use_prodigy_optimizer: bool = option(False, "Same as --optimizer=prodigy.", alias_of=("optimizer", "prodigy"))
    use_dadapt_optimizer: bool = option(False, "Same as --optimizer=dadaptation.", alias_of=("optimizer", "dadaptation"))
    adam_beta1: float | None = option(
        None, "Decay of the first moment.", at_least=0, at_most=0.99999, default_text=_in_adamw("adam_beta1"), argument="betas"
    )
    adam_beta2: float | None = option(
        None, "Decay of the second moment.", at_least=0, at_most=0.9999999, default_text=_in_adamw("adam_beta2"), argument="betas"
    )
    adam_weight_decay: float | None = option(
        None,
        "Weight decay, decoupled from the gradient.",
        at_least=0,
        default_text=_in_adamw("adam_weight_decay"),
        argument="weight_decay",
        needs=(("optimizer", AnyBut(("prodigy",))),),
    )
    adam_epsilon: float | None = option(
        None,
        "Added to the root of the second moment.",
        above=0,
        default_text=_in_adamw("adam_epsilon"),
        argument="eps",
        needs=(("optimizer", AnyBut(("prodigy",))),),
    )
    max_grad_norm: float = option(
        2.0, "Clip the norm of the whole gradient to this; 0 turns clipping off.", at_least=0, default_text="2; 0 under adafactor"
    )
    adafactor_relative_step: bool = option(
        False,
        "Adafactor's learning rate comes from the step and the size of the weights.",
        argument="relative_step",
        needs=(("optimizer", ("adafactor",)),),
    )
    prodigy_beta3: float | None = option(
        None,
        "Decay of the averages that Prodigy's step size is estimated from.",
        at_least=0,
        at_most=0.9999999,
        default_text="the square root of adam_beta2",
        argument="beta3",
        needs=PRODIGY,
    )
    prodigy_decouple: bool = option(
        True, "Prodigy's weight decay is decoupled from the gradient, as AdamW's.", argument="decouple", needs=PRODIGY
    )
    prodigy_use_bias_correction: bool = option(True, "Adam's bias correction under Prodigy.", argument="use_bias_correction", needs=PRODIGY)
    prodigy_safeguard_warmup: bool = option(
        True, "Leave the learning rate of warm-up out of Prodigy's estimate.", argument="safeguard_warmup", needs=PRODIGY
    )
    prodigy_learning_rate: float = option(
        0.5, "Prodigy's d_coef, a factor to the step size it estimates.", above=0, argument="d_coef", needs=PRODIGY
    )
    prodigy_weight_decay: float = option(1e-2, "Prodigy's weight decay.", at_least=0, argument="weight_decay", needs=PRODIGY)
    prodigy_epsilon: float = option(1e-8, "Added to the root of Prodigy's second moment.", above=0, argument="eps", needs=PRODIGY)
    dadaptation_learning_rate: float = option(
        1.0, "Takes the place of learning_rate under dadaptation.", above=0, needs=(("optimizer", ("dadaptation",)),), on_resume=FROM_HERE
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning rate: its peak, and how it changes over the run."""

    learning_rate: float = option(
        4e-7,
        "Peak learning rate.",
        above=0,
        default_text="4e-07; 1 where the optimiser estimates it (prodigy, dadaptation)",
        on_resume=FROM_HERE,
    )
    lr_scheduler: str = option(
        "sine",
        "Shape of the learning rate over the run.",
        env="LR_SCHEDULE",
        choices=SCHEDULES,
        default_text="sine; constant where the optimiser estimates the rate, constant_with_warmup where it averages (schedulefree)",
        on_resume=FROM_HERE,
    )
    lr_warmup_steps: int = option(
        500,
        "Optimiser steps of warm-up; under sine, half a wave.",
        at_least=0,
        needs=(("lr_scheduler", AnyBut(("constant",))),),
        on_resume=FROM_HERE,
    )
    lr_num_cycles: int = option(
        1, "Restarts of cosine_with_restarts.", at_least=1, needs=(("lr_scheduler", ("cosine_with_restarts",)),), on_resume=FROM_HERE
    )
    lr_power: float = option(0.8, "Power of the polynomial.", above=0, needs=(("lr_scheduler", ("polynomial",)),), on_resume=FROM_HERE)
    lr_end: float = option(
        4e-7,
        "Where linear, cosine and polynomial end; the floor of sine.",
        env="LEARNING_RATE_END",
        at_least=0,
        needs=(("lr_scheduler", AnyBut(("constant", "constant_with_warmup"))),),
        on_resume=FROM_HERE,
    )
    lr_scale: bool = option(
        False,
        "Multiply --learning_rate by the samples of a step: batch times accumulation times processes. --lr_end stays as it is.",
        on_resume=FROM_HERE,
    )


@dataclass(frozen=True)
class EmaOptions:
    """EMA: an exponential moving average of the trained weights."""

    use_ema: bool = option(False, "Keep an average of the trained weights; it is exported, the live weights beside it.")
    ema_decay: float = option(
        0.999, "Largest decay factor; update n uses min(ema_decay, (1 + n) / (10 + n)).", at_least=0, at_most=0.9999999, needs=EMA
    )
    ema_device: str = option("cpu", "Where the average lives.", choices=("cpu", "accelerator"), needs=EMA, on_resume=FROM_HERE)
    ema_cpu_only: bool = option(False, "Same as --ema_device=cpu.", alias_of=("ema_device", "cpu"), needs=EMA)
    ema_update_interval: int = option(1, "Optimiser steps between updates.", at_least=1, needs=EMA)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints: what a run can be continued from."""

    checkpointing_steps: int = option(500, "Optimiser steps between checkpoints.", at_least=1, on_resume=FROM_HERE)
    checkpoints_total_limit: int | None = option(
        None, "Keep this many of the newest checkpoints.", env="CHECKPOINTING_LIMIT", at_least=1, default_text="all", on_resume=FROM_HERE
    )
    keep_every: int | None = option(
        None, "Keep the checkpoints of these steps whatever the limit is: every N.", at_least=1, on_resume=FROM_HERE
    )
    resume_from_checkpoint: str | None = option(
        "latest", "latest, the name of a checkpoint in OUTPUT_DIR, or none for a new run.", env="RESUME_CHECKPOINT", on_resume=FROM_HERE
    )
