"""Whether a setting has an effect on a run, derived from what its option declares: what it needs, and what reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from helpers.config.axes import Axes
from helpers.config.declare import Option, show
from helpers.config.facts import FamilyFacts
from helpers.config.sources import Rank, Setting

Chosen = dict[str, Setting]


def unmet_need(item: Option, values: Mapping[str, Any]) -> str:
    """`lora_algorithm is lora`: the first setting that the option needs another value of; "" if nothing is missing."""
    for name, needed in item.needs:
        if values[name] not in needed:
            value = values[name]
            return f"{name} is {'on' if value is True else 'off' if value is False else show(value)}"
    return ""


@dataclass(frozen=True)
class Readers:
    """What reads options in a run: its family and its objective.

    `families` has more than one member as long as the base model can turn out to be of any of them.
    """

    axes: Axes
    families: tuple[FamilyFacts, ...]
    objective: str

    @classmethod
    def of(cls, axes: Axes, family: str, objective: str) -> Readers:
        """Before the base model is known: the family that was asked for, and those that only the base model tells from it."""
        asked = axes.families.get(family)
        alike = tuple(other for other in axes.families.values() if asked and other.command == asked.command and other is not asked)
        return cls(axes, (asked, *alike) if asked else (), objective)

    def not_for(self, item: Option) -> str:
        """`is for SDXL refiner, not for Stable Diffusion 3`; "" if the run reads the option, or nothing is known about its family."""
        if not self.families:
            return ""
        title = self.families[0].title
        if item.objective and item.objective != self.objective:
            trained_by, its = self.axes.objectives[self.objective], self.axes.objectives[item.objective].title
            instead = f" ({trained_by.instead[item.name]})" if item.name in trained_by.instead else ""
            return f"is for {its}, and {title} is trained by {trained_by.title}{instead}"
        if not any(family.reads(item) for family in self.families):
            return f"is for {', '.join(reader.title for reader in self.axes.readers(item))}, not for {title}"
        return ""


def leave_out_unread(readers: Readers, chosen: Chosen) -> Iterator[tuple[str, bool]]:
    """Reset settings of the user that the run does not read. => a sentence for each, and whether it is a refusal

    A variable of an env file that serves several families is left out, which is said; a flag was meant for this run and is refused.
    """
    for item in readers.axes.options.values():
        setting = chosen[item.name]
        if item.alias_of or setting.rank < Rank.VARIABLE or setting.value == item.default:
            continue
        if reason := readers.not_for(item):
            chosen[item.name] = Setting(item.default, "default", Rank.DECLARED)
            yield unread(item, reason, setting)


def unread(item: Option, reason: str, setting: Setting) -> tuple[str, bool]:
    """What to say about a setting that the run does not read, and whether it is a refusal."""
    if setting.rank >= Rank.EXTRA_ARGS:
        return f"{setting.origin} {reason}. Remove it.", True
    return f"{setting.origin} does nothing here: it {reason}.", False


def without_effect(axes: Axes, chosen: Mapping[str, Setting]) -> Iterator[str]:
    """One sentence for each reason why settings of the user have no effect, whatever the family is."""
    values = {name: setting.value for name, setting in chosen.items()}
    by_reason: dict[str, list[str]] = {}
    for item in axes.options.values():
        setting = chosen[item.name]
        if item.does_nothing:
            if setting.value != item.default:
                by_reason.setdefault(f": {item.does_nothing}", []).append(setting.origin)
        elif _says_something(setting, item) and (unmet := unmet_need(item, values)):
            by_reason.setdefault(f" while {unmet}", []).append(setting.origin)
    for reason, origins in by_reason.items():
        yield f"{', '.join(origins)} {'does' if len(origins) == 1 else 'do'} nothing{reason}."


def _says_something(setting: Setting, item: Option) -> bool:
    """Whether the user asked for anything: an option that is off by default and turned off says nothing."""
    return setting.rank > Rank.PRESET and setting.value is not None and bool(setting.value or item.default)
