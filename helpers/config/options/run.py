"""Options of the run itself: length, precision, optimizer, learning rate, EMA, checkpoints."""

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
    """Run: output folder, length, precision, speed and memory."""

    output_dir: Path = option(Path("simpletuner-results"), "Folder for everything that the run writes.", on_resume=FROM_HERE)
    demo: str | None = option(
        None,
        "Train the demo model that comes with SimpleTuner; --demo=photos trains it on photographs.",
        env=(),
        choices=("lora", "photos"),
        on_resume=FROM_HERE,
    )
    seed: int = option(
        42,
        "Seed of the order of images, the noise and all other random numbers. 0 or -1 chooses a random seed at the start of a run.",
        env="TRAINING_SEED",
        at_least=-1,
        at_most=LARGEST_SEED,
    )
    max_train_steps: int | None = option(
        None, "Length of the run in optimizer steps. Set this or --num_train_epochs.", env="MAX_NUM_STEPS", at_least=0, on_resume=LENGTH
    )
    num_train_epochs: int = option(
        1, "Length of the run in epochs (passes over the datasets).", env="NUM_EPOCHS", at_least=0, on_resume=LENGTH
    )
    max_train_seconds: float | None = option(
        None,
        "Time limit in seconds, caching included. After it, the run finishes the step, saves, and ends with exit code 75. "
        "Start it again to resume, with the same limit from then on.",
        above=0,
        on_resume=FROM_HERE,
    )
    disk_full: str = option(
        "stop",
        "What happens when a disk is full: stop ends the run with exit code 1, wait waits for space and continues.",
        choices=("stop", "wait"),
        on_resume=FROM_HERE,
    )
    gradient_accumulation_steps: int = option(
        4,
        "Micro-batches of each process in one optimizer step.",
        at_least=1,
        on_resume=" from step {step} on, so that a step keeps its micro-batches on the present number of processes",
    )
    gradient_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass instead of keeping them: much less VRAM, slower steps.",
        env="USE_GRADIENT_CHECKPOINTING",
        on_resume=ROUNDING,
    )
    mixed_precision: str = option(
        "bf16", "Precision of the computation; no is fp32. On a CPU, bf16 becomes no.", choices=("bf16", "fp16", "no")
    )
    allow_tf32: bool = option(False, "Use TF32 for fp32 matrix products on NVIDIA GPUs.", on_resume=ROUNDING)
    accelerator_cache_clear_interval: int | None = option(
        None, "Empty the GPU's memory cache every N steps.", at_least=1, on_resume=FROM_HERE
    )
    attention: str = option(
        "auto",
        "PyTorch's attention kernel: the fastest that supports the inputs (auto), or a certain one, with math as fallback.",
        choices=("auto", "flash", "efficient", "cudnn", "math"),
        on_resume=ROUNDING,
    )
    unet_attention_slice: bool = option(
        False,
        "Compute attention in slices: less VRAM on devices without a memory-efficient attention kernel (Apple).",
        some_families=True,
        on_resume=ROUNDING,
    )
    gradient_precision: str = option(
        "unmodified",
        "Precision in which gradients are accumulated: that of the weights (unmodified), or fp32 also for bf16 weights.",
        choices=("unmodified", "fp32"),
    )
    channels_last: bool = option(
        False,
        "Use the channels-last memory layout for convolutions, which is faster on many GPUs.",
        some_families=True,
        on_resume=ROUNDING,
    )
    base_quantization: str = option(
        "none",
        "Quantize the frozen base model to 8 bits (int8, fp8) or 4 bits (nf4, QLoRA) while an adapter is trained. "
        "See documentation/MEMORY.md.",
        choices=("none", "int8", "nf4", "fp8"),
    )
    offload_param_path: Path | None = option(None, "Folder for DeepSpeed's parameter offload to NVMe.", not_yet=True, on_resume=FROM_HERE)
    plan: bool = option(False, "Print what the run would do, and stop.", env=(), not_yet=True, on_resume=FROM_HERE)
    rehearse: bool = option(False, "Try every stage of the run at a small scale, and stop.", env=(), not_yet=True, on_resume=FROM_HERE)
    dataset_report: bool = option(
        False, "Scan the datasets, write OUTPUT_DIR/dataset_report.html and .json, and stop.", env=(), on_resume=FROM_HERE
    )


def _in_adamw(name: str) -> str:
    return f"{ADAMW_DEFAULTS[name]:g} for variants of AdamW, otherwise the optimizer's own"


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer: the algorithm that updates the weights, and its settings."""

    optimizer: str = option(
        "auto",
        "One of these optimizers, or any class of an installed library as module:Class. See documentation/OPTIMIZERS.md.",
        choices=NAMES,
        check_other=check_class,
        names_code=True,
        synonyms={"adamw_stochastic": "adamw_bf16"},
        default_text="adamw_bf16 where bf16 weights are trained, else adamw",
    )
    optimizer_args: str | None = option(
        None, "Further arguments of the optimizer by the names of its library: 'betas=0.9,0.99 weight_decay=0.1'.", default_text="its own"
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Keep the optimizer state in CPU memory and update the weights there: less VRAM, slower steps.",
        on_resume=ROUNDING,
    )
    adam_bfloat16: bool = option(False, "Same as --optimizer=adamw_bf16.", alias_of=("optimizer", "adamw_bf16"))
    use_8bit_adam: bool = option(False, "Same as --optimizer=adamw8bit.", alias_of=("optimizer", "adamw8bit"))
    use_adafactor_optimizer: bool = option(False, "Same as --optimizer=adafactor.", alias_of=("optimizer", "adafactor"))
    use_prodigy_optimizer: bool = option(False, "Same as --optimizer=prodigy.", alias_of=("optimizer", "prodigy"))
    use_dadapt_optimizer: bool = option(False, "Same as --optimizer=dadaptation.", alias_of=("optimizer", "dadaptation"))
    adam_beta1: float | None = option(
        None, "Decay rate of the first moment (beta1).", at_least=0, at_most=0.99999, default_text=_in_adamw("adam_beta1"), argument="betas"
    )
    adam_beta2: float | None = option(
        None,
        "Decay rate of the second moment (beta2).",
        at_least=0,
        at_most=0.9999999,
        default_text=_in_adamw("adam_beta2"),
        argument="betas",
    )
    adam_weight_decay: float | None = option(
        None,
        "Decoupled weight decay.",
        at_least=0,
        default_text=_in_adamw("adam_weight_decay"),
        argument="weight_decay",
        needs=(("optimizer", AnyBut(("prodigy",))),),
    )
    adam_epsilon: float | None = option(
        None,
        "Term that is added to the root of the second moment (epsilon).",
        above=0,
        default_text=_in_adamw("adam_epsilon"),
        argument="eps",
        needs=(("optimizer", AnyBut(("prodigy",))),),
    )
    max_grad_norm: float = option(
        2.0, "Clip the gradient to this norm; 0 turns clipping off.", at_least=0, default_text="2; 0 with adafactor"
    )
    adafactor_relative_step: bool = option(
        False,
        "Let Adafactor compute its learning rate from the step number and the size of the weights.",
        argument="relative_step",
        needs=(("optimizer", ("adafactor",)),),
    )
    prodigy_beta3: float | None = option(
        None,
        "Decay rate of the averages from which Prodigy estimates its step size.",
        at_least=0,
        at_most=0.9999999,
        default_text="the square root of adam_beta2",
        argument="beta3",
        needs=PRODIGY,
    )
    prodigy_decouple: bool = option(
        True, "Decouple Prodigy's weight decay from the gradient, as in AdamW.", argument="decouple", needs=PRODIGY
    )
    prodigy_use_bias_correction: bool = option(
        True, "Use Adam's bias correction in Prodigy.", argument="use_bias_correction", needs=PRODIGY
    )
    prodigy_safeguard_warmup: bool = option(
        True, "Exclude the learning rate during warm-up from Prodigy's estimate.", argument="safeguard_warmup", needs=PRODIGY
    )
    prodigy_learning_rate: float = option(
        0.5, "Prodigy's d_coef: a factor for the step size that it estimates.", above=0, argument="d_coef", needs=PRODIGY
    )
    prodigy_weight_decay: float = option(1e-2, "Prodigy's weight decay.", at_least=0, argument="weight_decay", needs=PRODIGY)
    prodigy_epsilon: float = option(
        1e-8, "Term that is added to the root of Prodigy's second moment.", above=0, argument="eps", needs=PRODIGY
    )
    dadaptation_learning_rate: float = option(
        1.0, "Replaces --learning_rate for dadaptation.", above=0, needs=(("optimizer", ("dadaptation",)),), on_resume=FROM_HERE
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning rate: its peak, and its schedule over the run."""

    learning_rate: float = option(
        1e-5,
        "Peak learning rate.",
        above=0,
        default_text="1e-05 for full fine-tuning, 0.0001 for adapters; 1 for optimizers that estimate it (prodigy, dadaptation)",
        on_resume=FROM_HERE,
    )
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Learning rate schedule over the run.",
        env="LR_SCHEDULE",
        choices=SCHEDULES,
        default_text="constant_with_warmup; constant for optimizers that estimate the rate",
        on_resume=FROM_HERE,
    )
    lr_warmup_steps: int | None = option(
        None,
        "Optimizer steps of warm-up; with sine, half of a period.",
        at_least=0,
        default_text="a tenth of the steps, at most 100; 500 with sine",
        needs=(("lr_scheduler", AnyBut(("constant",))),),
        on_resume=FROM_HERE,
    )
    lr_num_cycles: int = option(
        1,
        "Number of cycles of cosine_with_restarts.",
        at_least=1,
        needs=(("lr_scheduler", ("cosine_with_restarts",)),),
        on_resume=FROM_HERE,
    )
    lr_power: float = option(0.8, "Exponent of polynomial.", above=0, needs=(("lr_scheduler", ("polynomial",)),), on_resume=FROM_HERE)
    lr_end: float = option(
        4e-7,
        "Final learning rate of linear, cosine and polynomial; lowest learning rate of sine.",
        env="LEARNING_RATE_END",
        at_least=0,
        needs=(("lr_scheduler", AnyBut(("constant", "constant_with_warmup"))),),
        on_resume=FROM_HERE,
    )
    lr_scale: bool = option(
        False,
        "Multiply --learning_rate (not --lr_end) by the samples of a step: batch size x accumulation steps x processes.",
        on_resume=FROM_HERE,
    )


@dataclass(frozen=True)
class EmaOptions:
    """EMA: an exponential moving average of the trained weights."""

    use_ema: bool = option(False, "Keep an average of the trained weights. It is exported, and the live weights are exported as well.")
    ema_decay: float = option(
        0.999, "Decay rate; update n uses min(ema_decay, (1 + n) / (10 + n)).", at_least=0, at_most=0.9999999, needs=EMA
    )
    ema_device: str = option("cpu", "Device that stores the average.", choices=("cpu", "accelerator"), needs=EMA, on_resume=FROM_HERE)
    ema_cpu_only: bool = option(False, "Same as --ema_device=cpu.", alias_of=("ema_device", "cpu"), needs=EMA)
    ema_update_interval: int = option(1, "Optimizer steps between updates of the average.", at_least=1, needs=EMA)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints: saved states from which a run can resume."""

    checkpointing_start: int = option(
        0,
        "No checkpoint before this step, except when the run is stopped or ends.",
        at_least=0,
        on_resume=FROM_HERE,
    )
    checkpointing_steps: int = option(500, "Optimizer steps between checkpoints.", at_least=1, on_resume=FROM_HERE)
    checkpoints_total_limit: int | None = option(
        None,
        "Number of checkpoints to keep; older ones are removed.",
        env="CHECKPOINTING_LIMIT",
        at_least=1,
        default_text="all",
        on_resume=FROM_HERE,
    )
    keep_every: int | None = option(
        None, "Always keep the checkpoints of every Nth step, whatever --checkpoints_total_limit is.", at_least=1, on_resume=FROM_HERE
    )
    resume_from_checkpoint: str | None = option(
        "latest",
        "Checkpoint to resume from: latest, or the name of one in OUTPUT_DIR. none starts a new run.",
        env="RESUME_CHECKPOINT",
        on_resume=FROM_HERE,
    )
