"""Options -> OPTIONS.md and `--help`. toolkit/document.py writes the page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from helpers.config.axes import Axes
from helpers.config.datasets import DatasetConfig, Entry, JsonCaptionConfig, TableConfig, TextCacheConfig
from helpers.config.declare import WITH_THE_DATA, WITH_THE_WEIGHTS, AnyBut, Option, options_of, show
from helpers.config.options import VARIABLES, WITHOUT_EFFECT, IgnoredOptions, Variable
from helpers.config.sources import ABBREVIATIONS

_NOT_YET = "*Not available yet.*"

_HEAD = ("Option", "Variable", "Default", "What it does", "On resume")
_ON_RESUME = {"": "fixed", WITH_THE_DATA: "with the same data", WITH_THE_WEIGHTS: "with the same weights"}

_INTRODUCTION = """\
# Options

This page is generated from `helpers/config`; do not edit it, run `./simpletuner document`.

Every option is a flag (`--learning_rate 1e-4` or `--learning_rate=1e-4`) and a variable of the env file
(`LEARNING_RATE='1e-4'`). Where two variables are named, the first is the usual one and both are accepted. A switch is
set by `--use_ema`, `--use_ema=true` or `USE_EMA='true'`, and turned off by `--no-use_ema`, `--use_ema=false` or
`USE_EMA='false'`; 1/0, yes/no and on/off are accepted too. A variable that is empty counts as not set. Flags are
written out in full{abbreviation}.

If a setting is made more than once, the strongest source wins: a flag, then `TRAINER_EXTRA_ARGS`, then a variable, then
the demo's preset, then the default of the model family, method or objective, then the default on this page. At its
start, a run lists every setting that is not the default, with its source. `OUTPUT_DIR/config.json` has all of them.
Relative paths start at the directory you called from.

**On resume**: *fixed* settings cannot change when a run resumes; a different value is refused. Settings that *may change*
take effect from the checkpoint on, and the change is reported. *With the same data* and *with the same weights*: the
setting may change, but images, captions, latents and text embeddings, or the weights of the base model, must be the same.
Settings without effect on a run may always change.

A variable that the chosen model family does not use is ignored with one line, because an env file may serve several
families. A flag that it does not use is refused. An option that is *not available yet* is refused unless it has its default.
"""


def help_text(axes: Axes) -> str:
    """What `--help` prints: every option by section."""
    return "\n".join(_help_lines(axes))


def _help_lines(axes: Axes) -> Iterator[str]:
    yield "Train a diffusion model. Every option is also a variable of the env file: see OPTIONS.md."
    for section in axes.sections:
        yield f"\n{section.__doc__}"
        for item in _options(axes, section):
            yield f"  {item.flag}{_shape(item)}"
            text = f"{item.help} [{_default(item)}]{' Not available yet.' if item.not_yet else ''}"
            yield textwrap.fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _shape(item: Option) -> str:
    """What stands after the flag: ` N`, ` {a,b}`; nothing for a switch."""
    if item.choices:
        return " {" + ",".join(item.choices) + "}"
    return {bool: "", int: " N", float: " X", tuple: " A,B,..."}.get(item.kind, f" {item.kind.__name__.upper()}")


def _default(item: Option) -> str:
    return item.default_text or show(item.default)


def options_page(axes: Axes) -> str:
    """The whole of OPTIONS.md."""
    return "\n".join(_page(axes)) + "\n"


def _page(axes: Axes) -> Iterator[str]:
    short, full = next(iter(ABBREVIATIONS.items()))
    yield _INTRODUCTION.format(abbreviation=f" (only `--{short}` stands for `--{full}`)")
    for section in axes.sections:
        title, _, text = str(section.__doc__).partition(": ")
        yield f"## {title}\n\n{text[:1].upper()}{text[1:]}\n"
        if section is IgnoredOptions:
            yield from _table(("Option", "Variable", "What it did", "Why it does nothing"), map(_ignored_row, _options(axes, section)))
        else:
            yield from _table(_HEAD, (_option_row(axes, item) for item in _options(axes, section)))
    yield "## Variables that are no options\n"
    yield from _table(("Variable", "What it does"), map(_variable_row, VARIABLES))
    yield "These are accepted and do nothing:\n"
    yield from _table(("Variable", "Instead"), map(_variable_row, WITHOUT_EFFECT))
    yield "## Keys of the dataloader JSON\n"
    yield "The file is a list of entries, each an object; comments and trailing commas are allowed.\n"
    yield from _keys("Every entry", Entry, ())
    yield from _keys("Image datasets", DatasetConfig, options_of(Entry))
    yield from _keys("Objects `parquet`, `jsonl` and `csv` of an image dataset", TableConfig, ())
    yield from _keys("The object `json` of an image dataset", JsonCaptionConfig, ())
    yield from _keys("Entries with `dataset_type: text_embeds`", TextCacheConfig, options_of(Entry))


def _options(axes: Axes, section: type) -> list[Option]:
    return [axes.options[item.name] for item in options_of(section)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _option_row(axes: Axes, item: Option) -> tuple[str, ...]:
    on_resume = f"as `--{item.alias_of[0]}`" if item.alias_of else _ON_RESUME.get(item.on_resume, "may change")
    explained = " ".join(part for part in (_explained(item), *_conditions(axes, item)) if part)
    return f"`{item.flag}`", _variables(item), _code_or_words(item), explained, on_resume


def _conditions(axes: Axes, item: Option) -> Iterator[str]:
    """What the option needs to have an effect: other settings, an objective, a family."""
    for name, values in item.needs:
        choices = " or ".join(f"`{show(value)}`" for value in values)
        yield f"{'Not with' if isinstance(values, AnyBut) else 'Only with'} `--{name}` {choices}."
    if item.objective:
        yield f"Only for {axes.objectives[item.objective].title}."
    elif len(readers := axes.readers(item)) < len(axes.families):
        yield f"Only for {', '.join(family.title for family in readers)}."


def _ignored_row(item: Option) -> tuple[str, ...]:
    return f"`{item.flag}`", _variables(item), item.help, f"{item.does_nothing[:1].upper()}{item.does_nothing[1:]}."


def _variable_row(variable: Variable) -> tuple[str, ...]:
    return f"`{variable.name}`", variable.help


def _variables(item: Option) -> str:
    return _list(item.variables) or "flag only"


def _code_or_words(item: Option) -> str:
    return item.default_text or f"`{show(item.default)}`"


def _explained(item: Option) -> str:
    available = [choice for choice in item.choices if choice not in item.unavailable_choices]
    parts = [
        item.help,
        f"Choices: {_list(available)}." if available else "",
        f"*Not available yet:* {_list(item.unavailable_choices)}." if item.unavailable_choices else "",
        _range(item),
        _NOT_YET if item.not_yet else "",
    ]
    return " ".join(part for part in parts if part)


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _range(item: Option) -> str:
    bounds = [
        f"at least {show(item.at_least)}" if item.at_least is not None else "",
        f"above {show(item.above)}" if item.above is not None else "",
        f"at most {show(item.at_most)}" if item.at_most is not None else "",
    ]
    said = ", ".join(bound for bound in bounds if bound)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _keys(title: str, kind: type, left_out: Sequence[Option]) -> Iterator[str]:
    known = {item.name for item in left_out}
    yield f"### {title}\n"
    yield from _table(("Key", "Default", "What it does"), (_key_row(item) for item in options_of(kind) if item.name not in known))


def _key_row(item: Option) -> tuple[str, ...]:
    default = f"`--{item.inherits}`" if item.inherits else _code_or_words(item)
    nothing = f"Does nothing: {item.does_nothing}." if item.does_nothing else ""
    return _list((item.name, *item.aliases)), default, f"{_explained(item)} {nothing}".strip()


if __name__ == "__main__":
    raise SystemExit("run ./simpletuner document")
