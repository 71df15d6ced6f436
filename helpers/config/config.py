"""The Config: everything a run was told, settled, with the origin of every value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig, Entry, TableConfig, TextCacheConfig
from helpers.config.declare import masked, options_of, show
from helpers.config.facts import FamilyFacts, family_problems, with_origin
from helpers.config.options import (
    OPTIONS,
    SECTIONS,
    AdapterOptions,
    CacheOptions,
    CheckpointOptions,
    DataOptions,
    EmaOptions,
    IgnoredOptions,
    LaunchOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    ReportingOptions,
    RunOptions,
    ScheduleOptions,
    TextEncoderOptions,
    ValidationOptions,
)
from helpers.config.sources import DEFAULT
from helpers.errors import ConfigError

__all__ = ["DEFAULT", "Config"]


@dataclass(frozen=True)
class Config:
    """One attribute per section of OPTIONS.md, and the data sets. Built once by `read_config`; every value is the effective one."""

    model: ModelOptions
    adapter: AdapterOptions
    text_encoder: TextEncoderOptions
    objective: ObjectiveOptions
    data: DataOptions
    cache: CacheOptions
    run: RunOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    checkpoints: CheckpointOptions
    validation: ValidationOptions
    reporting: ReportingOptions
    launch: LaunchOptions
    ignored: IgnoredOptions
    datasets: tuple[DatasetConfig, ...]
    text_caches: tuple[TextCacheConfig, ...]
    family_name: str  # key of the families registry: "sdxl"
    method_name: str  # key of the methods registry: "full", "bitfit", "lora", "lycoris" or "controlnet"
    objective_name: str  # key of the objectives registry: "diffusion" or "flow"
    given: frozenset[str]  # options that somebody set: a flag, a variable, a preset, or the family, method or objective
    origins: Mapping[str, str]  # option -> "--seed", "TRAINING_SEED (sdxl-env.sh:12)", "demo/lora.json", "family sdxl", "default" ...
    notes: tuple[str, ...]  # sentences to say aloud at the start
    passed_variables: tuple[str, ...] = ()  # variables of the env file that are not ours, for the debug log

    @property
    def conditioning(self) -> tuple[DatasetConfig, ...]:
        """The data sets of conditions that are in use."""
        return tuple({of.id: of for dataset in self.datasets if (of := dataset.condition) is not None}.values())

    def values(self) -> dict[str, Any]:
        """The effective value of every option, by name."""
        sections = [(getattr(self, attribute), section) for attribute, section in SECTIONS.items()]
        return {item.name: getattr(chosen, item.name) for chosen, section in sections for item in options_of(section)}

    def describe(self) -> str:
        """Every setting that somebody made and that is not the declared default, by origin: the run's opening line."""
        by_origin: dict[str, list[str]] = {}
        for name, value in self.values().items():
            if name in self.given and value != OPTIONS[name].default and not OPTIONS[name].means:
                by_origin.setdefault(self.origins[name], []).append(f"{name} {_on_one_line(masked(show(value)))}")
        return " · ".join(f"{', '.join(told)} ({origin})" for origin, told in by_origin.items()) or "all settings are the defaults"

    def to_json(self) -> dict[str, Any]:
        """What OUTPUT_DIR/config.json holds: every effective setting with its origin. Declared settings only, and no secret."""
        return {
            "family": self.family_name,
            "method": self.method_name,
            "objective": self.objective_name,
            "settings": {name: {"value": _plain(value), "origin": self.origins[name]} for name, value in self.values().items()},
            "datasets": [_entry(dataset) for dataset in self.datasets],
            "conditioning": [_entry(conditions) for conditions in self.conditioning],
            "text_caches": [_entry(text) for text in self.text_caches],
        }

    def replaced(self, origin: str, **values: Any) -> Config:
        """The same Config with some options changed, for what only the running trainer can settle (a drawn seed, a CPU's precision)."""
        attribute_of = {item.name: attribute for attribute, section in SECTIONS.items() for item in options_of(section)}
        sections: dict[str, Any] = {}
        for name, value in values.items():
            attribute = attribute_of[name]
            sections[attribute] = dataclasses.replace(sections.get(attribute, getattr(self, attribute)), **{name: value})
        origins = {**self.origins, **dict.fromkeys(values, origin)}
        return dataclasses.replace(self, origins=origins, given=self.given | values.keys(), **sections)

    def of_family(self, family: FamilyFacts) -> Config:
        """The same Config for another family than was asked for, which the base model turned out to be of.

        Its defaults count where nobody set anything. ConfigError holds what it refuses.
        """
        defaults = {name: value for name, value in family.defaults.items() if name not in self.given}
        config = dataclasses.replace(self.replaced(f"family {family.name}", **defaults), family_name=family.name)
        if problems := list(family_problems(family, config.values())):
            given = {name: self.origins[name] for name in self.given}
            raise ConfigError(*(with_origin(problem, given) for problem in problems))
        return config

    def of_other_families(self, families: Mapping[str, FamilyFacts]) -> Iterator[str]:
        """One sentence for every setting that somebody made and that only other families than this one know."""
        own = families[self.family_name].options
        for name in self.values():
            knows = [family.title for family in families.values() if name in family.options]
            if knows and name in self.given - own and self.values()[name] != OPTIONS[name].default:
                yield f"{self.origins[name]} does nothing for {families[self.family_name].title}, only for {' and '.join(knows)}."


def _entry(entry: Entry | TableConfig) -> dict[str, Any]:
    """The effective keys of a data set or a table; those without effect or not available yet say nothing and are left out."""
    return dict(_telling(entry))


def _telling(entry: Entry | TableConfig) -> Iterator[tuple[str, Any]]:
    declared = {item.name: item for item in options_of(type(entry))}
    for field in dataclasses.fields(entry):
        item = declared.get(field.name)
        if item is None or not (item.secret or item.does_nothing or item.not_yet):
            yield field.name, _plain(getattr(entry, field.name))


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Path | str):
        return masked(str(value))
    if isinstance(value, Entry):
        return value.id  # it has a place of its own
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, TableConfig):
        return _entry(value)
    return value


def _on_one_line(text: str) -> str:
    """A prompt may have many lines; the first 80 characters tell which it is."""
    shown = " ".join(text.split())
    return shown if len(shown) <= 80 else shown[:79] + "…"
