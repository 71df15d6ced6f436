"""Flags, environment and dataloader JSON -> Config, remembering where each value came from and telling all mistakes at once."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.config.config import Config
from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import DataConfig
from helpers.config.declare import masked, options_of
from helpers.config.document import help_text
from helpers.config.env_file import EnvFile, read_env_file
from helpers.config.facts import Facts, FamilyFacts, family_problems, size_notes, with_origin
from helpers.config.options import OPTIONS, SECTIONS, VARIABLES, WITHOUT_EFFECT
from helpers.config.rules import impossible
from helpers.config.settle import Chosen, chosen_method, settle, take_switches, without_effect
from helpers.config.sources import REPOSITORY, Rank, from_extra_args, from_flags, from_preset, from_variables, strongest
from helpers.errors import ConfigError

KNOWN_VARIABLES = frozenset(
    [name for item in OPTIONS.values() for name in item.variables] + [variable.name for variable in (*VARIABLES, *WITHOUT_EFFECT)]
)


@dataclass(frozen=True)
class FactsByAxis:
    """What every choice says of the settings, by its name; given by train.py, because config imports none of them."""

    families: Mapping[str, FamilyFacts] = field(default_factory=dict)
    methods: Mapping[str, Facts] = field(default_factory=dict)
    objectives: Mapping[str, Facts] = field(default_factory=dict)


def read_config(argv: Sequence[str], environ: Mapping[str, str], facts: FactsByAxis) -> Config:
    """The Config of a run, from its flags (without the program's name), its environment and the files they name.

    `--help` prints the options and leaves with SystemExit(0). ConfigError holds every problem found, one sentence each.
    Imports nothing heavy and takes well under a second.
    """
    if any(word in ("--help", "-h") for word in argv):
        print(help_text())
        raise SystemExit(0)
    problems: list[str] = []
    env_file = _env_file(environ, problems)
    chosen = _chosen(argv, environ, env_file, problems)
    problems += take_switches(chosen)  # one of them may name the family
    names = _names(chosen, facts)
    choices = _facts_of(names, facts)
    problems += settle(chosen, choices)
    problems += _unavailable(chosen)
    data = _data(chosen)
    values = {name: setting.value for name, setting in chosen.items()}
    given = {name: setting.origin for name, setting in chosen.items() if setting.rank > Rank.DECLARED}
    judged = _judged(choices, values)
    problems += [*data.problems, *impossible(chosen, data), *(with_origin(problem, given) for problem in judged)]
    if problems:
        raise ConfigError(*dict.fromkeys(masked(problem) for problem in problems))
    return Config(
        **_sections(values),
        datasets=data.datasets,
        text_caches=data.text_caches,
        family_name=names["family"],
        method_name=names["method"],
        objective_name=names["objective"],
        origins={name: setting.origin for name, setting in chosen.items()},
        given=frozenset(given),
        notes=tuple(_notes(chosen, choices, data, env_file)),
        passed_variables=tuple(env_file.unknown(KNOWN_VARIABLES)),
    )


def _env_file(environ: Mapping[str, str], problems: list[str]) -> EnvFile:
    """The env file that the wrapper sourced, if it did."""
    path = environ.get("SIMPLETUNER_ENV_FILE")
    if not path:
        return EnvFile()
    try:
        env_file = read_env_file(Path(path))
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}; check SIMPLETUNER_ENV_FILE.")
        return EnvFile()
    problems.extend(env_file.misspelt(KNOWN_VARIABLES))
    return env_file


def _chosen(argv: Sequence[str], environ: Mapping[str, str], env_file: EnvFile, problems: list[str]) -> Chosen:
    """The strongest setting of every option."""
    sources = [from_variables(environ, env_file), from_extra_args(environ, env_file), from_flags(argv)]
    demo = strongest(sources)["demo"].value
    if demo:
        sources.insert(0, from_preset(demo))
    for source in sources:
        problems.extend(source.problems)
    return strongest(sources)


def _unavailable(chosen: Chosen) -> Iterator[str]:
    for item in OPTIONS.values():
        refusal = item.unavailable(chosen[item.name].value)
        if refusal:
            origin = chosen[item.name].origin
            yield f"{item.flag} {refusal}." if origin == item.flag else f"{origin}: {item.flag} {refusal}."


def _names(chosen: Chosen, facts: FactsByAxis) -> dict[str, str]:
    """The run's choice on each axis; the family says which objective its networks have."""
    family = str(chosen["model_family"].value)
    settings = {name: setting.value for name, setting in chosen.items()}
    objective = facts.families[family].objective_for(settings) if family in facts.families else "diffusion"
    return {"family": family, "method": chosen_method(chosen), "objective": objective}


def _facts_of(names: Mapping[str, str], facts: FactsByAxis) -> list[tuple[str, Facts]]:
    """The facts of the run's choices; a choice that is refused as not available has none."""
    axes = {"family": facts.families, "method": facts.methods, "objective": facts.objectives}
    return [(axis, table[names[axis]]) for axis, table in axes.items() if names[axis] in table]


def _data(chosen: Chosen) -> DataConfig:
    setting = chosen["data_backend_config"]
    path = setting.value
    if path is None:
        return DataConfig()
    if not os.path.isfile(path):
        return DataConfig(problems=(f"{setting.origin}: there is no file {path}; write a dataloader JSON there, or correct the path.",))
    options = {name: setting.value for name, setting in chosen.items()}
    return read_dataloader(path, options, base=REPOSITORY if chosen["demo"].value else None)


def _judged(choices: Sequence[tuple[str, Facts]], values: Mapping[str, object]) -> Iterator[str]:
    """What the run's family, method and objective refuse."""
    for _, choice in choices:
        yield from family_problems(choice, values) if isinstance(choice, FamilyFacts) else choice.judge(values)


def _sections(values: Mapping[str, Any]) -> dict[str, Any]:
    return {attribute: section(**{item.name: values[item.name] for item in options_of(section)}) for attribute, section in SECTIONS.items()}


def _notes(chosen: Chosen, choices: Sequence[tuple[str, Facts]], data: DataConfig, env_file: EnvFile) -> Iterator[str]:
    yield from without_effect(chosen)
    yield from data.notes
    yield from _size_notes(choices, data)
    yield from _variables_without_effect(env_file)
    yield from env_file.maybe_misspelt(KNOWN_VARIABLES)


def _size_notes(choices: Sequence[tuple[str, Facts]], data: DataConfig) -> Iterator[str]:
    sizes = {dataset.id: (dataset.resolution, dataset.resolution_type) for dataset in data.datasets}
    for _, choice in choices:
        if isinstance(choice, FamilyFacts):
            yield from size_notes(choice, sizes)


def _variables_without_effect(env_file: EnvFile) -> Iterator[str]:
    for variable in WITHOUT_EFFECT:
        if variable.name in env_file.lines:
            yield f"{env_file.origin(variable.name)} does nothing: {variable.help[0].lower()}{variable.help[1:]}"
