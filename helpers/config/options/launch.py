"""What the wrapper and the launcher need to know, and variables that are no options."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.config.declare import FROM_HERE, ROUNDING, option


@dataclass(frozen=True)
class LaunchOptions:
    """Launch: how many processes train together."""

    training_num_processes: int = option(1, "Processes in all, usually one a GPU.", at_least=1, on_resume=FROM_HERE)
    training_num_machines: int = option(1, "Machines that train together.", at_least=1, on_resume=FROM_HERE)
    accelerate_extra_args: str = option("", "More arguments of accelerate launch, split by the shell's rules.", on_resume=FROM_HERE)
    training_dynamo_backend: str = option(
        "no",
        "Compile the network for training by this back end of torch.compile, as accelerate names it; then a resumed run only nearly equals"
        " an undisturbed one.",
        on_resume=ROUNDING,
    )


@dataclass(frozen=True)
class Variable:
    """A variable that is known but sets no option."""

    name: str
    help: str


VARIABLES = (
    Variable("TRAINER_EXTRA_ARGS", "More flags, split by the shell's rules; stronger than variables, weaker than the wrapper's own flags."),
    Variable("DEBUG_EXTRA_ARGS", "The same, read before TRAINER_EXTRA_ARGS."),
    Variable("ENV_FILE", "Given to the wrapper: another env file."),
    Variable("BASE_DIR", "A helper for the env file's own paths."),
    Variable("TOKENIZERS_PARALLELISM", "Read by the tokenizers library."),
    Variable("SIMPLETUNER_LOG_LEVEL", "Log level of the trainer: DEBUG, INFO, WARNING, ERROR."),
    Variable("SIMPLETUNER_ENV_FILE", "Set by the wrapper: the env file it sourced."),
    Variable("HF_HOME", "Where models from the hub are kept."),
    Variable("HF_HUB_OFFLINE", "Read by the hub's own library: with 1 nothing is fetched, and what HF_HOME holds is used."),
    Variable("HF_TOKEN", "Hub token, read by the hub's own library and stored nowhere."),
    Variable("WANDB_API_KEY", "Read by wandb itself and stored nowhere."),
    Variable("COMET_API_KEY", "Read by comet itself and stored nowhere."),
)

WITHOUT_EFFECT = (
    Variable("PURE_BF16", "Say OPTIMIZER='adamw_bf16'."),
    Variable("PLATFORM", "The device is found by looking."),
    Variable("SIMPLETUNER_TRAINING_LOOP_LOG_LEVEL", "The times of every step are in metrics.jsonl."),
    Variable("SIMPLETUNER_COLLATE_LOG_LEVEL", "Use SIMPLETUNER_LOG_LEVEL."),
    Variable("SIMPLETUNER_AWS_LOG_LEVEL", "Use SIMPLETUNER_LOG_LEVEL."),
    Variable("SIMPLETUNER_SCHEDULER_VERBOSE", "The learning rate of every step is in metrics.jsonl."),
    Variable("SIMPLETUNER_MAXIMUM_IMAGE_SIZE_OVERRIDE", "There is no such limit to lift."),
    Variable("SIMPLETUNER_SHUFFLE_ASPECTS", "The order of caching does not matter."),
    Variable("SIMPLETUNER_DEBUG_IMAGE_PREP", "No intermediate images are written."),
    Variable("SIMPLETUNER_DISABLE_ACCELERATOR", "There is no dry run of this kind."),
)
