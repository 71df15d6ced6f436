"""The Config: the effective value of every setting of a run, with its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config.axes import Axes
from helpers.config.datasets import DatasetConfig, Entry, JsonCaptionConfig, TableConfig, TextCacheConfig
from helpers.config.declare import Option, by_name, masked, options_of, show
from helpers.config.effect import Readers, unread
from helpers.config.facts import FamilyFacts, family_problems, with_origin
from helpers.config.options import (
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
from helpers.config.sources import DEFAULT, Rank, Setting
from helpers.errors import ConfigError

__all__ = ["DEFAULT", "Config"]


@dataclass(frozen=True)
class Config:
    """One attribute per common section of OPTIONS.md, the families' own sections, and the datasets.

    Built once by `read_config`; every value is the effective one.
    """

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
    ranks: Mapping[str, Rank]  # option -> how strong the source of its value is
    origins: Mapping[str, str]  # option -> "--seed", "TRAINING_SEED (sdxl-env.sh:12)", "demo/lora.json", "family sdxl", "default" ...
    notes: tuple[str, ...]  # sentences to say aloud at the start
    passed_variables: tuple[str, ...] = ()  # variables of the env file that are not ours, for the debug log

    @property
    def conditioning(self) -> tuple[DatasetConfig, ...]:
        """The datasets of conditioning images that are in use."""
        return tuple({of.id: of for dataset in self.datasets if (of := dataset.condition) is not None}.values())

    @property
    def masks(self) -> tuple[DatasetConfig, ...]:
        """The datasets of loss masks that are in use."""
        return tuple({of.id: of for dataset in self.datasets if (of := dataset.mask) is not None}.values())

    @property
    def _sections(self) -> list[Any]:
        return [*(getattr(self, attribute) for attribute in SECTIONS), *self.model.family_sections]

    @property
    def options(self) -> dict[str, Option]:
        """Every option as it is declared, by name."""
        return by_name(type(chosen) for chosen in self._sections)

    @property
    def given(self) -> frozenset[str]:
        """Options that somebody set: a flag, a variable, a preset, or the family, method or objective."""
        return frozenset(name for name, rank in self.ranks.items() if rank > Rank.DECLARED)

    @property
    def said(self) -> frozenset[str]:
        """Options that the user set: a flag or a variable."""
        return frozenset(name for name, rank in self.ranks.items() if rank >= Rank.VARIABLE)

    def values(self) -> dict[str, Any]:
        """The effective value of every option, by name."""
        return {item.name: getattr(chosen, item.name) for chosen in self._sections for item in options_of(type(chosen))}

    def describe(self) -> str:
        """Every setting that somebody made and that is not the declared default, by origin: the run's opening line."""
        by_origin: dict[str, list[str]] = {}
        options = self.options
        for name, value in self.values().items():
            if name in self.given and value != options[name].default and not options[name].alias_of:
                by_origin.setdefault(self.origins[name], []).append(f"{name} {on_one_line(masked(show(value)))}")
        return " · ".join(f"{', '.join(settings)} ({origin})" for origin, settings in by_origin.items()) or "all settings are the defaults"

    def to_json(self) -> dict[str, Any]:
        """What OUTPUT_DIR/config.json holds: every effective setting with its origin. Declared settings only, and no secret."""
        return {
            "family": self.family_name,
            "method": self.method_name,
            "objective": self.objective_name,
            "settings": {name: {"value": plain(value), "origin": self.origins[name]} for name, value in self.values().items()},
            "datasets": [_entry(dataset) for dataset in self.datasets],
            "conditioning": [_entry(conditions) for conditions in self.conditioning],
            "masks": [_entry(masks) for masks in self.masks],
            "text_caches": [_entry(text) for text in self.text_caches],
        }

    def replaced(self, origin: str, **values: Any) -> Config:
        """The same Config with some options changed, for what only the running trainer can settle (a drawn seed, a CPU's precision)."""
        if unknown := values.keys() - self.options.keys():
            raise KeyError(f"{min(unknown)} is no option")

        def with_values(chosen: Any) -> Any:
            its = {item.name: values[item.name] for item in options_of(type(chosen)) if item.name in values}
            return dataclasses.replace(chosen, **its) if its else chosen

        sections: dict[str, Any] = {attribute: with_values(getattr(self, attribute)) for attribute in SECTIONS}
        own = tuple(with_values(chosen) for chosen in self.model.family_sections)
        sections["model"] = dataclasses.replace(sections["model"], family_sections=own)
        origins = {**self.origins, **dict.fromkeys(values, origin)}
        ranks = {**self.ranks, **{name: max(self.ranks[name], Rank.FAMILY) for name in values}}
        return dataclasses.replace(self, origins=origins, ranks=ranks, **sections)

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

    def unread(self, axes: Axes) -> list[str]:
        """One sentence for every variable that the run's family does not read. ConfigError for flags that it does not read.

        For a family that the base model was found to be of; what no family with the same wrapper reads was found before.
        """
        readers, values = Readers(axes, (axes.families[self.family_name],), self.objective_name), self.values()
        sentences = [
            unread(item, reason, Setting(values[name], self.origins[name], self.ranks[name]))
            for name, item in axes.options.items()
            if name in self.said and values[name] != item.default and not item.alias_of and (reason := readers.not_for(item))
        ]
        if refused := [sentence for sentence, is_refusal in sentences if is_refusal]:
            raise ConfigError(*refused)
        return [sentence for sentence, _ in sentences]


def _entry(entry: Entry | TableConfig | JsonCaptionConfig) -> dict[str, Any]:
    """The effective keys of a dataset or a table; those without effect or not available yet say nothing and are left out."""
    return dict(_telling(entry))


def _telling(entry: Entry | TableConfig | JsonCaptionConfig) -> Iterator[tuple[str, Any]]:
    declared = {item.name: item for item in options_of(type(entry))}
    for field in dataclasses.fields(entry):
        item = declared.get(field.name)
        if item is None or not (item.secret or item.does_nothing or item.not_yet):
            yield field.name, plain(getattr(entry, field.name))


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Path | str):
        return masked(str(value))
    if isinstance(value, Entry):
        return value.id  # it has a place of its own
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, TableConfig | JsonCaptionConfig):
        return _entry(value)
    return value


def on_one_line(text: str) -> str:
    """A prompt may have many lines; the first 80 characters tell which it is."""
    shown = " ".join(text.split())
    return shown if len(shown) <= 80 else shown[:79] + "…"
