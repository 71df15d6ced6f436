"""What shows that a run goes well: validation images, logs, uploads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.config.declare import FROM_HERE, option
from helpers.config.options.run import LARGEST_SEED

TRACKERS = ("tensorboard", "wandb", "comet", "none")


@dataclass(frozen=True)
class ValidationOptions:
    """Validation: images made before, during and after training."""

    validation_prompt: str | None = option(None, "A prompt; its images are named 'validation'.", on_resume=FROM_HERE)
    user_prompt_library: Path | None = option(None, "JSON file of more prompts: {name: prompt}.", on_resume=FROM_HERE)
    validation_prompt_library: bool = option(
        False,
        "Make pictures of 32 prompts of all kinds too (helpers/training/prompt_library.py); the user's replace those of the same name.",
        on_resume=FROM_HERE,
    )
    validation_negative_prompt: str = option(
        "blurry, cropped, ugly", "What the images should not look like; empty for nothing.", may_be_empty=True, on_resume=FROM_HERE
    )
    validation_disable_unconditional: bool = option(False, "Make no image from an empty prompt.", on_resume=FROM_HERE)
    num_validation_images: int = option(1, "Images of each prompt and size.", at_least=1, on_resume=FROM_HERE)
    validation_steps: int = option(
        100, "Optimiser steps between validations; 0 validates only before and after training.", at_least=0, on_resume=FROM_HERE
    )
    validation_num_inference_steps: int = option(30, "Denoising steps of an image.", at_least=1, on_resume=FROM_HERE)
    validation_resolution: str | None = option(
        None, "Comma list of sizes: 1024x768 or 1024 in pixels, 1.0 in megapixels.", default_text="the training size", on_resume=FROM_HERE
    )
    validation_guidance: float = option(7.5, "Strength of classifier-free guidance.", at_least=0, on_resume=FROM_HERE)
    validation_guidance_rescale: float = option(
        0.0, "Rescale guided noise; 0.7 for zero terminal SNR.", at_least=0, at_most=1, on_resume=FROM_HERE
    )
    validation_noise_scheduler: str = option(
        "euler", "Sampler, also of the exported pipeline.", choices=("ddim", "ddpm", "euler", "euler-a", "unipc"), on_resume=FROM_HERE
    )
    validation_seed: int | None = option(
        None,
        "Seed of the images.",
        at_least=0,
        at_most=LARGEST_SEED,
        default_text="--seed",
        needs=(("validation_randomize", (False,)),),
        on_resume=FROM_HERE,
    )
    validation_randomize: bool = option(False, "Another seed each time.", on_resume=FROM_HERE)
    validation_seed_source: str = option(
        "cpu", "Device that draws the noise.", choices=("cpu", "gpu"), unavailable_choices=("gpu",), on_resume=FROM_HERE
    )
    validation_using_datasets: bool = option(
        False,
        "Beside the prompts, make pictures that begin with pictures of the data sets (img2img) under their captions, taken back by"
        " --refiner_training_strength of the schedule. Models that refine pictures do this always, and make no others.",
        on_resume=FROM_HERE,
    )
    num_eval_images: int = option(
        4, "Pictures of each data set to begin with: the first that are trained.", at_least=1, on_resume=FROM_HERE
    )
    eval_dataset_id: str | None = option(None, "Take them from the data set with this id only.", on_resume=FROM_HERE)
    validation_torch_compile: bool = option(
        False,
        "Compile the network for the images (torch.compile); worth its minutes where they are many. Training is as before.",
        on_resume=FROM_HERE,
    )
    validation_torch_compile_mode: str = option(
        "max-autotune",
        "What is compiled for.",
        choices=("max-autotune", "reduce-overhead", "default"),
        needs=(("validation_torch_compile", (True,)),),
        on_resume=FROM_HERE,
    )


@dataclass(frozen=True)
class ReportingOptions:
    """Reporting: who is told how the run goes."""

    report_to: tuple[str, ...] = option(
        ("tensorboard",),
        "Comma list of trackers; none turns them off. Comet is sent the curves alone, the others the pictures too.",
        choices=TRACKERS,
        synonyms={"comet_ml": "comet"},
        on_resume=FROM_HERE,
    )
    tracker_project_name: str = option("simpletuner", "Project in the tracker.", on_resume=FROM_HERE)
    tracker_run_name: str = option("simpletuner-testing", "Run in the tracker.", on_resume=FROM_HERE)
    logging_dir: Path = option(Path("logs"), "Tracker files; a relative path is inside OUTPUT_DIR.", on_resume=FROM_HERE)
    push_to_hub: bool = option(False, "Upload the result to the hub.", not_yet=True, on_resume=FROM_HERE)
    push_checkpoints_to_hub: bool = option(
        False,
        "Upload each checkpoint too; only with --push_to_hub.",
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
    webhook_config: Path | None = option(None, "JSON file of a chat webhook.", not_yet=True, on_resume=FROM_HERE)
