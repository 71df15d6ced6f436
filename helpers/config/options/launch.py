"""Options of the launcher, and variables that are not options."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.config.declare import FROM_HERE, ROUNDING, option


@dataclass(frozen=True)
class LaunchOptions:
    """Launch: processes, machines and the launcher."""

    training_num_processes: int = option(1, "Total number of processes, usually one per GPU.", at_least=1, on_resume=FROM_HERE)
    training_num_machines: int = option(1, "Number of machines that train together.", at_least=1, on_resume=FROM_HERE)
    accelerate_extra_args: str = option("", "Further arguments of accelerate launch, split like a shell command.", on_resume=FROM_HERE)
    training_dynamo_backend: str = option(
        "no",
        "Compile the network for training with this torch.compile backend, as accelerate names it. A resumed run is then not "
        "bit-identical to an uninterrupted one.",
        on_resume=ROUNDING,
    )


@dataclass(frozen=True)
class Variable:
    """A known variable that does not set an option."""

    name: str
    help: str


VARIABLES = (
    Variable(
        "TRAINER_EXTRA_ARGS",
        "Further flags, split like a shell command. They override variables, and the wrapper's own flags override them.",
    ),
    Variable("DEBUG_EXTRA_ARGS", "The same, read before TRAINER_EXTRA_ARGS."),
    Variable("ENV_FILE", "For the wrapper: another env file."),
    Variable("BASE_DIR", "For paths inside the env file."),
    Variable("TOKENIZERS_PARALLELISM", "Read by the tokenizers library."),
    Variable("SIMPLETUNER_LOG_LEVEL", "Log level of the trainer: DEBUG, INFO, WARNING, ERROR."),
    Variable("SIMPLETUNER_ENV_FILE", "Set by the wrapper: the env file it sourced."),
    Variable("HF_HOME", "Folder for models from the hub."),
    Variable("HF_HUB_OFFLINE", "Read by huggingface_hub: with 1 nothing is downloaded, and only files in HF_HOME are used."),
    Variable("HF_TOKEN", "Access token of the hub, read by huggingface_hub and never stored."),
    Variable("WANDB_API_KEY", "Read by wandb itself and never stored."),
    Variable("COMET_API_KEY", "Read by comet itself and never stored."),
)

WITHOUT_EFFECT = (
    Variable("PURE_BF16", "Use OPTIMIZER='adamw_bf16'."),
    Variable("PLATFORM", "The device is detected."),
    Variable("SIMPLETUNER_TRAINING_LOOP_LOG_LEVEL", "The times of every step are in metrics.jsonl."),
    Variable("SIMPLETUNER_COLLATE_LOG_LEVEL", "Use SIMPLETUNER_LOG_LEVEL."),
    Variable("SIMPLETUNER_AWS_LOG_LEVEL", "Use SIMPLETUNER_LOG_LEVEL."),
    Variable("SIMPLETUNER_SCHEDULER_VERBOSE", "The learning rate of every step is in metrics.jsonl."),
    Variable("SIMPLETUNER_MAXIMUM_IMAGE_SIZE_OVERRIDE", "There is no such limit."),
    Variable("SIMPLETUNER_SHUFFLE_ASPECTS", "The order of caching does not matter."),
    Variable("SIMPLETUNER_DEBUG_IMAGE_PREP", "No intermediate images are written."),
    Variable("SIMPLETUNER_DISABLE_ACCELERATOR", "There is no dry run of this kind."),
)
