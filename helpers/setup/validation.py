"""What a run is validated on: prompts, and images of its datasets."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from helpers.config.options import OPTIONS
from helpers.config.rules import VALIDATION_FOLDER
from helpers.families.networks.samplers import sampler
from helpers.setup.model import sampler_class
from helpers.training import validation
from helpers.training.validation import DatasetImage, Prompt, ValidationInputs, Validator

if TYPE_CHECKING:
    from helpers.config.config import Config
    from helpers.data.ports import TextTensors
    from helpers.data.training_data import TrainingData
    from helpers.protocols import ModelFamily
    from helpers.reporting import Reporters
    from helpers.setup.run import Run
    from helpers.training.live_text import LiveText

SEARCHED_STEPS = 64  # of the first epoch, in search of dataset images to validate on; a rarely drawn dataset may then show fewer


def note_unused_options(config: Config, family: ModelFamily, report: Reporters) -> None:
    """One line for each validation option that has no effect in this run."""
    if family.refines:
        report.chapter("", f"{family.facts.title} is validated on dataset images with their captions, not on prompts")
    for name in ("num_eval_images", "eval_dataset_id"):
        if not uses_images(config, family) and config.values()[name] != OPTIONS[name].default:
            report.chapter("", f"{config.origins[name]} does nothing while validation_using_datasets is off.")


def captions_to_encode(config: Config, family: ModelFamily) -> list[str]:
    """The captions that validation needs encoded, besides those of the datasets."""
    return validation.captions_to_encode(prompts(config, family), config.validation, uses_images(config, family))


def prompts(config: Config, family: ModelFamily) -> list[Prompt]:
    """The prompts that validation generates images of; none if the family works on images only."""
    return [] if family.refines else validation.read_prompts(config.validation)


def uses_images(config: Config, family: ModelFamily) -> bool:
    """Whether validation starts from images of the datasets, or follows their conditions."""
    return bool(family.refines or config.model.controlnet or config.validation.validation_using_datasets)


def make_validator(run: Run, data: TrainingData, live: LiveText | None) -> Validator:
    """`live` encodes prompts with the text encoders as they are at that step; without it they come from the cache."""
    config = run.config
    kind, spacing = sampler_class(config, run.objective), config.objective.inference_scheduler_timestep_spacing
    return Validator(
        config.validation,
        run.family,
        run.runtime,
        _inputs(run, data, live),
        lambda: sampler(kind, run.objective.scheduler_config, spacing),
        config.run.output_dir / VALIDATION_FOLDER,
    )


def _inputs(run: Run, data: TrainingData, live: LiveText | None) -> ValidationInputs:
    """Prompts, sizes, seed and dataset images that validation generates from."""
    config, family = run.config, run.family
    own_prompts = prompts(config, family)
    images = _dataset_images(config, data) if uses_images(config, family) else {}
    if config.model.controlnet:
        images, own_prompts = validation.with_prompts_on_first(images, own_prompts), []

    def text(caption: str | None) -> TextTensors:
        if live:
            return live.encode_caption(caption or None)
        return data.text(caption) if caption else data.unconditional

    options = config.validation
    seed = options.validation_seed if options.validation_seed is not None else run.state.seed
    sizes = validation.parse_sizes(options.validation_resolution, data.most_common_shape, family.latents.alignment)
    return ValidationInputs([*own_prompts, *images], sizes, text, seed, images, config.objective.refiner_training_strength)


def _dataset_images(config: Config, data: TrainingData) -> dict[Prompt, DatasetImage]:
    """The first trained images of each dataset that validation may use."""
    options = config.validation
    used = [dataset.id for dataset in config.datasets if not dataset.disable_validation and options.eval_dataset_id in (None, dataset.id)]
    samples = data.samples_of_datasets
    counts = {dataset: min(options.num_eval_images, samples[dataset]) for dataset in used if dataset in samples}
    searched = max(1, min(SEARCHED_STEPS, int(data.steps_per_epoch)))
    with contextlib.closing(data.steps(0, searched, keep_captions=True)) as steps:
        return validation.first_images(steps, counts)
