"""Flags, environment and dataloader JSON -> Config, remembering where each value came from and telling all mistakes at once."""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import DataConfig
from helpers.config.declare import masked, options_of
from helpers.config.document import help_text
from helpers.config.effect import Readers, leave_out_unread, without_effect
from helpers.config.env_file import EnvFile, read_env_file
from helpers.config.facts import Facts, FamilyFacts, family_problems, size_notes, with_origin
from helpers.config.optimizer_rules import optimizer_notes
from helpers.config.options import SECTIONS, VARIABLES, WITHOUT_EFFECT
from helpers.config.rules import impossible
from helpers.config.settle import Chosen, chosen_method, layers_kept, settle, take_switches
from helpers.config.sources import REPOSITORY, Options, Rank, Setting, from_extra_args, from_flags, from_preset, from_variables, strongest
from helpers.errors import ConfigError


def known_variables(options: Options) -> frozenset[str]:
    """The names of all variables that set an option or are read otherwise."""
    of_options = [name for item in options.values() for name in item.variables]
    return frozenset([*of_options, *(variable.name for variable in (*VARIABLES, *WITHOUT_EFFECT))])


def read_config(argv: Sequence[str], environ: Mapping[str, str], axes: Axes) -> Config:
    """The Config of a run, from its flags (without the program's name), its environment and the files they name.

    `--help` prints the options and leaves with SystemExit(0). ConfigError holds every problem found, one sentence each.
    Imports nothing heavy and takes well under a second.
    """
    if any(word in ("--help", "-h") for word in argv):
        print(help_text(axes))
        raise SystemExit(0)
    problems: list[str] = []
    options = axes.options
    env_file = _env_file(environ, known_variables(options), problems)
    chosen = _chosen(options, argv, environ, env_file, problems)
    problems += take_switches(options, chosen)  # one of them may name the family
    names = _names(chosen, axes)
    choices = _facts_of(names, axes)
    unread = list(leave_out_unread(Readers.of(axes, names["family"], names["objective"]), chosen))
    problems += [sentence for sentence, is_refusal in unread if is_refusal]
    problems += settle(chosen, choices)
    problems += _unavailable(options, chosen)
    data = _data(chosen)
    values = {name: setting.value for name, setting in chosen.items()}
    given = {name: setting.origin for name, setting in chosen.items() if setting.rank > Rank.DECLARED}
    judged = _judged(choices, values)
    problems += [*data.problems, *impossible(chosen, data, environ), *(with_origin(problem, given) for problem in judged)]
    if problems:
        raise ConfigError(*dict.fromkeys(masked(problem) for problem in problems))
    return Config(
        **_sections(axes, values),
        datasets=data.datasets,
        text_caches=data.text_caches,
        family_name=names["family"],
        method_name=names["method"],
        objective_name=names["objective"],
        origins={name: setting.origin for name, setting in chosen.items()},
        ranks={name: setting.rank for name, setting in chosen.items()},
        notes=(*(sentence for sentence, _ in unread), *_notes(axes, chosen, choices, data, env_file)),
        passed_variables=tuple(env_file.unknown(known_variables(options))),
    )


def _env_file(environ: Mapping[str, str], known: frozenset[str], problems: list[str]) -> EnvFile:
    """The env file that the wrapper sourced, if it did."""
    path = environ.get("SIMPLETUNER_ENV_FILE")
    if not path:
        return EnvFile()
    try:
        env_file = read_env_file(Path(path))
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}; check SIMPLETUNER_ENV_FILE.")
        return EnvFile()
    problems.extend(env_file.misspelt(known))
    return env_file


def _chosen(options: Options, argv: Sequence[str], environ: Mapping[str, str], env_file: EnvFile, problems: list[str]) -> Chosen:
    """The strongest setting of every option."""
    sources = [from_variables(options, environ, env_file), from_extra_args(options, environ, env_file), from_flags(options, argv)]
    demo = strongest(options, sources)["demo"].value
    if demo:
        sources.insert(0, from_preset(options, demo))
    for source in sources:
        problems.extend(source.problems)
    return strongest(options, sources)


def _unavailable(options: Options, chosen: Chosen) -> Iterator[str]:
    for item in options.values():
        refusal = item.unavailable(chosen[item.name].value)
        if refusal:
            origin = chosen[item.name].origin
            yield f"{item.flag} {refusal}." if origin == item.flag else f"{origin}: {item.flag} {refusal}."


def _names(chosen: Chosen, axes: Axes) -> dict[str, str]:
    """The run's choice on each axis; the family says which objective its networks have."""
    family = str(chosen["model_family"].value)
    settings = {name: setting.value for name, setting in chosen.items()}
    objective = axes.families[family].objective_for(settings) if family in axes.families else "diffusion"
    return {"family": family, "method": chosen_method(chosen), "objective": objective}


def _facts_of(names: Mapping[str, str], axes: Axes) -> list[tuple[str, Facts]]:
    """The facts of the run's choices; a choice that is refused as not available has none."""
    tables: Mapping[str, Mapping[str, Facts]] = {"family": axes.families, "method": axes.methods, "objective": axes.objectives}
    return [(axis, table[names[axis]]) for axis, table in tables.items() if names[axis] in table]


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


def _sections(axes: Axes, values: Mapping[str, Any]) -> dict[str, Any]:
    def section(kind: type) -> Any:
        return kind(**{item.name: values[item.name] for item in options_of(kind)})

    common = {attribute: section(kind) for attribute, kind in SECTIONS.items()}
    return common | {"model": dataclasses.replace(common["model"], family_sections=tuple(map(section, axes.family_sections)))}


def _notes(axes: Axes, chosen: Chosen, choices: Sequence[tuple[str, Facts]], data: DataConfig, env_file: EnvFile) -> Iterator[str]:
    yield from without_effect(axes, chosen)
    yield from optimizer_notes(chosen)
    yield from _of_another_place(chosen)
    yield from layers_kept(chosen)
    yield from data.notes
    yield from _size_notes(choices, data)
    yield from _variables_without_effect(env_file)
    yield from env_file.twice(known_variables(axes.options))
    yield from env_file.maybe_misspelt(known_variables(axes.options))


def _of_another_place(chosen: Mapping[str, Setting]) -> Iterator[str]:
    """What says where to find a base model that is found elsewhere."""
    model = Path(chosen["pretrained_model_name_or_path"].value or "").expanduser()
    if not chosen["pretrained_model_name_or_path"].value or not model.exists():
        return
    if chosen["revision"].value is not None:
        yield f"{chosen['revision'].origin} does nothing: the base model is on this machine, and not on the hub."
    if chosen["single_file_config"].value is not None and model.is_dir():
        yield f"{chosen['single_file_config'].origin} does nothing: the base model is a folder, and no single file."


def _size_notes(choices: Sequence[tuple[str, Facts]], data: DataConfig) -> Iterator[str]:
    sizes = {dataset.id: (dataset.resolution, dataset.resolution_type) for dataset in data.datasets}
    for _, choice in choices:
        if isinstance(choice, FamilyFacts):
            yield from size_notes(choice, sizes)


def _variables_without_effect(env_file: EnvFile) -> Iterator[str]:
    for variable in WITHOUT_EFFECT:
        if variable.name in env_file.lines:
            yield f"{env_file.origin(variable.name)} does nothing: {variable.help[0].lower()}{variable.help[1:]}"
