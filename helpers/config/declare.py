"""How an option is declared: one dataclass field gives the flag, the variable, the help line, the row of OPTIONS.md and the check."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

from helpers.config.suggest import did_you_mean

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")
_METADATA = "option"
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


Needs = tuple[tuple[str, tuple[Any, ...]], ...]

# What `on_resume` says of most options that may change.
FROM_HERE = " from step {step} on"
ROUNDING = " from step {step} on, which changes results by rounding errors at most"
WITH_THE_DATA = "; the data is compared with the checkpoint's by itself"
WITH_THE_WEIGHTS = "; the weights of the base model are compared with the checkpoint's by themselves"


class AnyBut(tuple[Any, ...]):
    """In `needs`: every value except these."""

    def __contains__(self, value: object) -> bool:
        return not super().__contains__(value)


@dataclass(frozen=True)
class Declared:
    """What an option's declaration says. `Option` adds the field's name, which is the flag, and its type.

    Everything else about options is derived from this: the checks, `--help`, OPTIONS.md, what a resumed run may change, and the
    lines about settings that have no effect. A path whose real default depends on other settings has `default=None` and
    `default_text`; `settle` fills it in.
    """

    default: Any
    help: str
    _: KW_ONLY
    env: str | tuple[str, ...] | None = None  # historic variables, accepted beside the field's name in capitals; (): flag only
    choices: tuple[str, ...] = ()
    check_other: Callable[[str], None] | None = None  # for values that are no choice: ValueError says why this one cannot be used
    names_code: bool = False  # a value may name Python code: only flags and env files, which are the user's own, may set it
    synonyms: Mapping[str, str] = field(default_factory=dict)  # other spellings of choices -> the choice
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    # Whether a resumed run may have another value. "" (the default): no, it is refused. Otherwise yes, and this is the end of the
    # sentence "learning_rate was 0.0001 and is 5e-05 ...", in which {step} stands for the checkpoint's step.
    on_resume: str = ""
    needs: Needs = ()  # (option, its values) that must all hold for this option to have an effect
    argument: str = ""  # the argument of the optimizer that it sets, which --optimizer_args could set too
    objective: str = ""  # the only objective that reads it, by its name in the registry
    some_families: bool = False  # only families that name it in their facts read it; options of a family's own section need not say so
    not_yet: bool = False
    unavailable_choices: tuple[str, ...] = ()  # choices that are named but not available yet
    alias_of: tuple[str, Any] | None = None  # (option, value) that this switch sets
    choice_aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # choice -> the options it sets, this one included
    does_nothing: str = ""  # why an accepted option has no effect
    default_text: str = ""  # the default in words, where it depends on other settings
    aliases: tuple[str, ...] = ()  # other spellings of a key in the dataloader JSON
    inherits: str = ""  # the option that a dataset falls back to
    secret: bool = False
    each: Callable[[Any], Any] = str  # reads an element of a list in the dataloader JSON; ValueError says what is wrong with it
    may_be_empty: bool = False  # an empty variable is a value, not the absence of one
    one_or_many: bool = False  # in the dataloader JSON, a text stands for a list of one
    of_type: str = ""  # the only `type` of dataset that has this key; "" for all


P = ParamSpec("P")


def _as_field(declare: Callable[P, Declared]) -> Callable[P, Any]:
    """The same call, returning the dataclass field that holds the declaration."""

    def declared_field(*args: P.args, **words: P.kwargs) -> Any:
        declared = declare(*args, **words)
        return field(default=declared.default, repr=not declared.secret, metadata={_METADATA: declared})

    return declared_field


option = _as_field(Declared)  # in a section: `seed: int = option(1, "What it does.", at_least=0)`


@dataclass(frozen=True)
class Option(Declared):
    """One option, complete."""

    name: str
    section: str
    kind: type  # bool, int, float, str, Path, or tuple for a comma list of str
    optional: bool  # None is a value

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that set it, the preferred one first."""
        if self.env == ():
            return ()
        historic = (self.env,) if isinstance(self.env, str) else self.env or ()
        return tuple(dict.fromkeys((*historic, self.name.upper())))

    def meaning(self, value: Any) -> Mapping[str, Any]:
        """The options that this value sets, by name, where it is an alias; otherwise an empty mapping."""
        if self.alias_of:
            return dict([self.alias_of]) if value else {}
        return self.choice_aliases.get(value, {}) if self.choice_aliases else {}

    def parse(self, text: str) -> Any:
        """The value that `text` (from a flag, a variable or a preset) stands for; ValueError says what is wrong with it."""
        value = self._convert(text)
        self.check(value)
        return value

    def _convert(self, text: str) -> Any:
        stripped = text.strip()
        if self.optional and (stripped in ("", "''", '""') or (self.kind is not str and stripped.lower() == "none")):
            return None
        if self.kind is bool:
            return parse_bool(stripped)
        if self.kind is tuple:
            return tuple(self.synonyms.get(part.strip(), part.strip()) for part in text.split(",") if part.strip())
        if self.kind is Path:
            return Path(text).expanduser()
        if self.kind is str:
            return self.synonyms.get(text, text)
        try:
            return self.kind(stripped)
        except ValueError:
            raise ValueError(f"{text!r} is not {'a whole number' if self.kind is int else 'a number'}") from None

    def check(self, value: Any) -> None:
        """ValueError unless the value is one of the choices and within the declared range."""
        for item in value if isinstance(value, tuple) else (value,):
            if not self.choices or item is None or item in self.choices:
                continue
            if self.check_other is None:
                raise ValueError(f"{item!r} is not one of {', '.join(self.choices)}{did_you_mean(str(item), self.choices)}")
            self.check_other(item)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        if self.at_least is not None and value < self.at_least:
            raise ValueError(f"{value} is below {show(self.at_least)}")
        if self.above is not None and value <= self.above:
            raise ValueError(f"{value} is not above {show(self.above)}")
        if self.at_most is not None and value > self.at_most:
            raise ValueError(f"{value} is above {show(self.at_most)}")

    def unavailable(self, value: Any) -> str | None:
        """The part of a refusal after the option's name ("is not available yet ..."), or None when the value can be used."""
        items = value if isinstance(value, tuple) else (value,)
        late = [item for item in items if item in self.unavailable_choices]
        if late:
            built = ", ".join(choice for choice in self.choices if choice not in self.unavailable_choices)
            return f"{late[0]!r} is not available yet" + (f"; today it can be {built}" if built else "")
        if self.not_yet and value != self.default:
            usual = f"leave it at {show(self.default)}" if self.default not in (None, "", ()) else "leave it out"
            return f"is not available yet; {usual}"
        return None


def parse_bool(text: str) -> bool:
    """ValueError unless `text` is 1, 0, true, false, yes, no, on or off, in any case."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def show(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def masked(text: str) -> str:
    """Text without the user and password of any address in it."""
    return _URL_CREDENTIALS.sub("***", text)


def options_of(section: type) -> tuple[Option, ...]:
    """The options a section's dataclass declares, in its order."""
    return _options_of(section)


@functools.cache
def _options_of(section: type) -> tuple[Option, ...]:
    hints = typing.get_type_hints(section)
    return tuple(
        Option(**_declaration(item), name=item.name, section=section.__name__, **_kind(hints[item.name]))
        for item in dataclasses.fields(section)
        if _METADATA in item.metadata
    )


def _declaration(item: dataclasses.Field[Any]) -> dict[str, Any]:
    declared = item.metadata[_METADATA]
    return {word.name: getattr(declared, word.name) for word in dataclasses.fields(declared)}


def _kind(hint: Any) -> dict[str, Any]:
    """`int | None` => {"kind": int, "optional": True}; tuple[str, ...] => {"kind": tuple, "optional": False}."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"an option has one type, not {hint}")
    kind = typing.get_origin(kinds[0]) or kinds[0]
    return {"kind": kind, "optional": len(kinds) < len(members)}


def by_name(sections: Iterable[type]) -> dict[str, Option]:
    """All options of the sections; a name is declared once."""
    table: dict[str, Option] = {}
    for section in sections:
        for item in options_of(section):
            if item.name in table:
                raise TypeError(f"{item.name} is declared twice: in {table[item.name].section} and {item.section}")
            table[item.name] = item
    return table
