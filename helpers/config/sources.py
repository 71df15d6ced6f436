"""Where settings come from: flags, variables, a demo's preset. Each source gives settings with their origin, and problems."""

from __future__ import annotations

import os.path
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from helpers.config.declare import FALSE_WORDS, TRUE_WORDS, Option
from helpers.config.env_file import EnvFile
from helpers.config.json_file import read_json
from helpers.config.other_names import FLAGS, from_another_trainer
from helpers.config.suggest import did_you_mean
from helpers.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRA_ARGS = ("DEBUG_EXTRA_ARGS", "TRAINER_EXTRA_ARGS")  # a later one wins
WRAPPERS_FAMILY = "SIMPLETUNER_FAMILY"  # the variable that wrappers say their family with
DEFAULT = "default"  # the origin of a declared default
ABBREVIATIONS = {"train_batch": "train_batch_size"}  # the one that wrappers of the June 2024 release relied on

Options = Mapping[str, Option]  # by name


class Rank(IntEnum):
    """How strong a source is; the strongest setting of an option counts."""

    DECLARED = 0
    FAMILY = 1
    PRESET = 2
    WRAPPER = 3  # the family that a wrapper is for, which a setting of the user may change
    VARIABLE = 4
    EXTRA_ARGS = 5
    FLAG = 6


@dataclass(frozen=True)
class Setting:
    """A value and where it came from, in words: `--seed`, `TRAINING_SEED (sdxl-env.sh:12)`, `default`."""

    value: Any
    origin: str
    rank: Rank


def said_by(chosen: Mapping[str, Setting], name: str) -> str:
    """Who set an option; its flag where nobody did."""
    setting = chosen[name]
    return setting.origin if setting.rank > Rank.DECLARED else f"--{name}"


@dataclass
class Source:
    """What one source sets, and what is wrong in it."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take(self, item: Option, text: str, origin: str, rank: Rank) -> None:
        """Set the option to what `text` stands for, or note why it cannot be."""
        try:
            if item.names_code and rank < Rank.VARIABLE and text not in item.choices:
                raise ValueError(f"{text!r} names Python code, which only a flag or the env file may do")
            self.settings[item.name] = Setting(item.parse(text), origin, rank)
        except ValueError as error:
            self.problems.append(f"{origin}: {error}.")


def from_flags(options: Options, argv: Sequence[str], rank: Rank = Rank.FLAG, through: str = "") -> Source:
    """Read `--name value`, `--name=value`, `--switch`, `--no-switch`. `through` names the variable that carried them."""
    source = Source()
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            source.problems.append(f"{_shortened(word)!r} is not an option; a value with spaces stands in quotes{_by(through)}.")
            continue
        item = _option(options, name)
        if item is None:
            source.problems.append(f"--{name} is not an option{_meant(options, name)}{_by(through)}.")
            if not has_value and words and not words[0].startswith("--"):
                words.pop(0)  # most likely its value
            continue
        text = value if has_value else _value_of(options, item, name, words)
        if text is None:
            source.problems.append(f"--{name} needs a value{_by(through)}.")
        else:
            source.take(item, text, f"--{name}" + (f" in {through}" if through else ""), rank)
    return source


def _meant(options: Options, name: str) -> str:
    return from_another_trainer(name, FLAGS) or did_you_mean(name, options, prefix="--")


def _option(options: Options, name: str) -> Option | None:
    """The option that a flag without its dashes means; `no-` turns a switch off."""
    if name.startswith("no-"):
        item = options.get(name.removeprefix("no-"))
        return item if item is not None and item.kind is bool else None
    return options.get(ABBREVIATIONS.get(name, name))


def _value_of(options: Options, item: Option, name: str, words: list[str]) -> str | None:
    """The value of a flag without `=`, taken from the words that follow; None when there is none."""
    if name.startswith("no-"):
        return "false"
    if item.kind is bool:
        follows = bool(words) and words[0].lower() in (*TRUE_WORDS, *FALSE_WORDS)
        return words.pop(0) if follows else "true"
    if item.name == "demo":
        return words.pop(0) if words and words[0] in item.choices else "lora"
    if not words or _is_flag(options, words[0]):
        return None
    return words.pop(0)


def _is_flag(options: Options, word: str) -> bool:
    return word.startswith("--") and _option(options, word[2:].partition("=")[0]) is not None


def from_extra_args(options: Options, environ: Mapping[str, str], env_file: EnvFile) -> Source:
    """Flags carried by DEBUG_EXTRA_ARGS and TRAINER_EXTRA_ARGS, split once by the shell's rules."""
    source = Source()
    for variable in EXTRA_ARGS:
        origin = env_file.origin(variable)
        try:
            words = shlex.split(environ.get(variable, ""))
        except ValueError as error:
            source.problems.append(f"{origin}: cannot be split into words: {error}.")
            continue
        found = from_flags(options, words, Rank.EXTRA_ARGS, origin)
        source.settings.update(found.settings)
        source.problems.extend(found.problems)
    return source


def from_variables(options: Options, environ: Mapping[str, str], env_file: EnvFile) -> Source:
    """Read every option's variables. One that is set but empty counts as not set, unless emptiness is a value of the option."""
    source = Source()
    for item in options.values():
        given = [name for name in item.variables if environ.get(name, "").strip() or (item.may_be_empty and name in environ)]
        values = {environ[name] for name in given}
        if len(values) > 1:
            both = " and ".join(env_file.origin(name) for name in given)
            source.problems.append(f"{both} are the same setting and differ; remove one.")
        if given:
            rank = Rank.WRAPPER if given[0] == WRAPPERS_FAMILY else Rank.VARIABLE
            source.take(item, environ[given[0]], env_file.origin(given[0]), rank)
    return source


def from_preset(options: Options, name: str, repository: Path = REPOSITORY) -> Source:
    """The settings of an embedded demo, `demo/<name>.json`: {option: value}, with paths relative to the repository root."""
    path = repository / "demo" / f"{name}.json"
    origin = f"demo/{name}.json"
    try:
        values = read_json(path).value
    except ConfigError as error:
        return Source(problems=list(error.problems))
    if not isinstance(values, dict):
        return Source(problems=[f"{origin}: must be an object of options."])
    source = Source()
    for key, value in values.items():
        item = options.get(key)
        if item is None:
            source.problems.append(f"{origin}: {key} is not an option{did_you_mean(key, options)}.")
        else:
            source.take(item, _text(item, value, repository), origin, Rank.PRESET)
    return source


def _text(item: Option, value: Any, repository: Path) -> str:
    """A JSON value as text, paths made absolute."""
    if isinstance(value, list):
        return ",".join(str(element) for element in value)
    if value is None:
        return ""
    text = str(value)
    is_path = item.kind is Path and item.name != "logging_dir"  # relative to OUTPUT_DIR
    if is_path or (item.name.endswith("_name_or_path") and os.path.exists(repository / text)):
        return str(repository / text)
    return text


def strongest(options: Options, sources: Sequence[Source]) -> dict[str, Setting]:
    """For every option the strongest setting, or its declared default."""
    chosen = {item.name: Setting(item.default, DEFAULT, Rank.DECLARED) for item in options.values()}
    for name, setting in _all(sources):
        if setting.rank >= chosen[name].rank:
            chosen[name] = setting
    return chosen


def _all(sources: Sequence[Source]) -> Iterator[tuple[str, Setting]]:
    for source in sources:
        yield from source.settings.items()


def _by(through: str) -> str:
    return f" (in {through})" if through else ""


def _shortened(word: str) -> str:
    return word if len(word) <= 40 else word[:37] + "..."
