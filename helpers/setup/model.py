"""Which network is trained, which of its weights, and on which loss: family, method and objective of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.choices import known_axes
from helpers.config.declare import show
from helpers.errors import ConfigError
from helpers.families import FAMILIES
from helpers.families.loading.file_facts import read_facts
from helpers.families.loading.locate import locate, without_weights
from helpers.families.loading.recognize import recognize
from helpers.methods import METHODS
from helpers.methods.base_lora import BaseLora
from helpers.methods.text_encoders import require_something_to_train
from helpers.objectives import OBJECTIVES
from helpers.protocols import can_train_text_encoders

if TYPE_CHECKING:
    from helpers.config.config import Config
    from helpers.config.facts import FamilyFacts
    from helpers.config.options import ObjectiveOptions
    from helpers.protocols import ModelFamily, Objective, TrainingMethod
    from helpers.reporting import Reporters
    from helpers.training.runtime import Runtime


def resolve_base_model(config: Config, runtime: Runtime, report: Reporters) -> Config:
    """The settings for the family of the base model, which may be another than the wrapper's: train_sdxl.sh also trains the refiner.

    Downloads the base model, or converts a single file, once on the main process. A dataset report needs no weights and downloads none.
    """
    if config.run.dataset_report:
        if runtime.is_main:
            without_weights(config.model)
        runtime.wait_for_everyone()
        config = dataclasses.replace(config, model=without_weights(config.model))
    axes = known_axes()
    if runtime.is_main:
        recognize(config.family_name, config.model, config.cache)
    runtime.wait_for_everyone()
    family = axes.families[recognize(config.family_name, config.model, config.cache)]
    if family.name != config.family_name:
        defaults = [f"{name} {show(value)}" for name, value in family.defaults.items() if name not in config.given]
        config = config.of_family(family)
        report.chapter("model", " · ".join((f"{family.title}, by its model_index.json", *defaults)))
    for note in (*_single_file_notes(config), *config.unread(axes)):
        report.chapter("", note)
    return config


def _single_file_notes(config: Config) -> Iterator[str]:
    """What a base model in one file says of itself, and which settings contradict it."""
    file = Path(config.model.pretrained_model_name_or_path).expanduser()
    facts = read_facts(locate(config.model, config.cache)) if file.is_file() else None
    if facts is not None:
        yield from facts.notes
        yield from facts.contradicted_by(file.name, config.objective.prediction_type, config.objective.rescale_betas_zero_snr)


def choose_axes(config: Config) -> tuple[ModelFamily, TrainingMethod, Objective]:
    """Family, method and objective of the run. ConfigError or ModelError if one of them does not support the settings."""
    family = FAMILIES[config.family_name](config.model, config.cache)
    method = METHODS[config.method_name](config.adapter, family)
    if config.text_encoder.train_text_encoder and config.model.model_type == "full":
        assert can_train_text_encoders(family), "the settings refuse --train_text_encoder for other families"
        require_something_to_train(family, config.text_encoder)
    options = with_zero_snr(config.objective, family.facts, family.scheduler_config)
    objective = OBJECTIVES[config.objective_name](options, family.scheduler_config, family.latents.patch)
    _require_sampler(config, objective)
    return family, method, objective


def read_base_lora(config: Config, family: ModelFamily) -> BaseLora | None:
    """The file of --base_lora. ConfigError where it is no LoRA of the family."""
    return BaseLora.read(config.adapter.base_lora, family) if config.adapter.base_lora else None


def with_zero_snr(options: ObjectiveOptions, family: FamilyFacts, schedule: Mapping[str, Any]) -> ObjectiveOptions:
    """With zero terminal SNR where it is the family's default: for v-prediction without offset noise, which cannot be combined with it."""
    predicted = options.prediction_type or schedule.get("prediction_type")
    if family.zero_snr and predicted == "v_prediction" and options.rescale_betas_zero_snr is None and not options.offset_noise:
        return dataclasses.replace(options, rescale_betas_zero_snr=True)
    return options


def zero_snr_notes(config: Config, family: ModelFamily, objective: Objective) -> Iterator[str]:
    """One line if the default of the family decides about zero terminal SNR."""
    if not family.facts.zero_snr or config.objective.rescale_betas_zero_snr is not None:
        return
    if objective.identity.get("prediction_type") != "v_prediction":
        return
    if config.objective.offset_noise:
        yield "zero terminal SNR is off, because --offset_noise cannot be combined with it"
    else:
        yield "zero terminal SNR is on, the default for v-prediction (--no-rescale_betas_zero_snr turns it off)"


def sampler_class(config: Config, objective: Objective) -> str:
    """Diffusers' scheduler class for validation images. The exported pipeline names it too, so that it samples as validation does."""
    return objective.samplers[config.validation.validation_noise_scheduler]


def _require_sampler(config: Config, objective: Objective) -> None:
    """ConfigError if the sampler does not fit the objective, which is known only now: the base model may set the prediction type."""
    asked = config.validation.validation_noise_scheduler
    if asked not in objective.samplers:
        raise ConfigError(
            f"--validation_noise_scheduler={asked} cannot sample what this model predicts; use {', '.join(objective.samplers)}."
        )
