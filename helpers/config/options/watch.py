"""Options of validation images, trackers and uploads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.config.declare import FROM_HERE, option
from helpers.config.options.run import LARGEST_SEED

TRACKERS = ("tensorboard", "wandb", "comet", "none")


@dataclass(frozen=True)
class ValidationOptions:
    """Validation: images made before, during and after training."""

    validation_prompt: str | None = option(None, "Prompt for validation images, which are named 'validation'.", on_resume=FROM_HERE)
    user_prompt_library: Path | None = option(None, "JSON file with further prompts: {name: prompt}.", on_resume=FROM_HERE)
    validation_prompt_library: bool = option(
        False,
        "Also validate on 32 built-in prompts (helpers/training/prompt_library.py). Your prompts replace those of the same name.",
        on_resume=FROM_HERE,
    )
    validation_negative_prompt: str = option(
        "blurry, cropped, ugly", "Negative prompt of the validation images; may be empty.", may_be_empty=True, on_resume=FROM_HERE
    )
    validation_disable_unconditional: bool = option(False, "Generate no image with an empty prompt.", on_resume=FROM_HERE)
    num_validation_images: int = option(1, "Number of images for each prompt and size.", at_least=1, on_resume=FROM_HERE)
    validation_steps: int = option(
        100, "Optimizer steps between validations; 0 validates only before and after training.", at_least=0, on_resume=FROM_HERE
    )
    validation_num_inference_steps: int = option(30, "Denoising steps of each image.", at_least=1, on_resume=FROM_HERE)
    validation_resolution: str | None = option(
        None, "Comma-separated sizes: 1024x768 or 1024 in pixels, 1.0 in megapixels.", default_text="the training size", on_resume=FROM_HERE
    )
    validation_guidance: float = option(7.5, "Strength of classifier-free guidance.", at_least=0, on_resume=FROM_HERE)
    validation_guidance_rescale: float = option(
        0.0, "Guidance rescale; 0.7 is usual with zero terminal SNR.", at_least=0, at_most=1, on_resume=FROM_HERE
    )
    validation_noise_scheduler: str = option(
        "euler",
        "Sampler of the validation images and of the exported pipeline.",
        choices=("ddim", "ddpm", "euler", "euler-a", "unipc"),
        on_resume=FROM_HERE,
    )
    validation_seed: int | None = option(
        None,
        "Seed of the validation images.",
        at_least=0,
        at_most=LARGEST_SEED,
        default_text="--seed",
        needs=(("validation_randomize", (False,)),),
        on_resume=FROM_HERE,
    )
    validation_randomize: bool = option(False, "Use another seed at each validation.", on_resume=FROM_HERE)
    validation_seed_source: str = option(
        "cpu", "Device that generates the noise.", choices=("cpu", "gpu"), unavailable_choices=("gpu",), on_resume=FROM_HERE
    )
    validation_using_datasets: bool = option(
        False,
        "Also generate image-to-image validation images: from images of the datasets, with their captions and a strength of "
        "--refiner_training_strength. Refiner models always do this, and only this.",
        on_resume=FROM_HERE,
    )
    num_eval_images: int = option(
        4, "Number of such images for each dataset: the first ones that are trained.", at_least=1, on_resume=FROM_HERE
    )
    eval_dataset_id: str | None = option(None, "Take these images from the dataset with this id only.", on_resume=FROM_HERE)
    validation_torch_compile: bool = option(
        False,
        "Compile the network for validation (torch.compile). This takes minutes, and pays off with many images. Training does not change.",
        on_resume=FROM_HERE,
    )
    validation_torch_compile_mode: str = option(
        "max-autotune",
        "Mode of torch.compile for validation.",
        choices=("max-autotune", "reduce-overhead", "default"),
        needs=(("validation_torch_compile", (True,)),),
        on_resume=FROM_HERE,
    )


@dataclass(frozen=True)
class ReportingOptions:
    """Reporting: trackers, logs and uploads."""

    report_to: tuple[str, ...] = option(
        ("tensorboard",),
        "Comma-separated trackers; none turns them off. Comet gets the curves only, the others also the images.",
        choices=TRACKERS,
        synonyms={"comet_ml": "comet"},
        on_resume=FROM_HERE,
    )
    tracker_project_name: str = option("simpletuner", "Name of the project in the tracker.", on_resume=FROM_HERE)
    tracker_run_name: str = option("simpletuner-testing", "Name of the run in the tracker.", on_resume=FROM_HERE)
    logging_dir: Path = option(Path("logs"), "Folder for tracker files; a relative path is inside OUTPUT_DIR.", on_resume=FROM_HERE)
    push_to_hub: bool = option(False, "Upload the result to the hub.", not_yet=True, on_resume=FROM_HERE)
    push_checkpoints_to_hub: bool = option(
        False,
        "Also upload each checkpoint; only with --push_to_hub.",
        env="PUSH_CHECKPOINTS",
        needs=(("push_to_hub", (True,)),),
        on_resume=FROM_HERE,
    )
    hub_model_id: str | None = option(
        None,
        "Repository on the hub; only with --push_to_hub.",
        env="HUB_MODEL_NAME",
        default_text="--tracker_project_name",
        needs=(("push_to_hub", (True,)),),
        on_resume=FROM_HERE,
    )
    webhook_config: Path | None = option(None, "JSON file with a chat webhook.", not_yet=True, on_resume=FROM_HERE)
