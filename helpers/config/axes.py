"""Everything that can be chosen: the families, methods and objectives, and all options, those that families declare included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from helpers.config.declare import Option, by_name, show
from helpers.config.facts import Facts, FamilyFacts
from helpers.config.options import SECTIONS

FIRST_SECTION = "model"  # the families' own sections follow it in --help and OPTIONS.md


@dataclass(frozen=True)
class Axes:
    """The facts of every choice, by its name in the registry. helpers/choices.py collects them; config imports no family itself."""

    families: Mapping[str, FamilyFacts] = field(default_factory=dict)
    methods: Mapping[str, Facts] = field(default_factory=dict)
    objectives: Mapping[str, Facts] = field(default_factory=dict)

    @cached_property
    def family_sections(self) -> tuple[type, ...]:
        """The sections that families declare, in the order of the registry, each once."""
        return tuple(dict.fromkeys(family.section for family in self.families.values() if family.section is not None))

    @cached_property
    def sections(self) -> tuple[type, ...]:
        """All sections in the order of OPTIONS.md."""
        first = SECTIONS[FIRST_SECTION]
        return (first, *self.family_sections, *(section for section in SECTIONS.values() if section is not first))

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """Every option by its name, with the families' choices of --model_family and --model_type."""
        options = by_name(self.sections)
        own = {section.__name__ for section in self.family_sections}
        for item in [item for item in options.values() if item.section in own and item.alias_of is None]:
            options[item.name] = dataclasses.replace(item, some_families=True)
        options |= {name: self._with_family_defaults(item) for name, item in options.items()}
        return options | {item.name: item for item in (self._model_family(options), self._model_type(options))}

    def _with_family_defaults(self, item: Option) -> Option:
        """The option with the defaults that families replace its own by, in the words of OPTIONS.md and --help."""
        names_of: dict[str, list[str]] = {}
        for family in self.families.values():
            if (value := family.defaults.get(item.name, item.default)) != item.default:
                names_of.setdefault(show(value), []).append(family.name)
        usual = item.default_text or show(item.default)
        words = [usual, *(f"{value} for {', '.join(names)}" for value, names in names_of.items())]
        return dataclasses.replace(item, default_text="; ".join(words)) if names_of else item

    def _model_family(self, options: Mapping[str, Option]) -> Option:
        selectable = [family for family in self.families.values() if family.selectable]
        item = options["model_family"]
        if not selectable:
            return item
        titles = ", ".join(f"{family.name} ({family.title})" for family in selectable)
        names = tuple(family.name for family in selectable)
        return dataclasses.replace(item, default=names[0], choices=names, help=f"{item.help} Families: {titles}.")

    def _model_type(self, options: Mapping[str, Option]) -> Option:
        item = options["model_type"]
        further = {name: sets for family in self.families.values() for name, sets in family.model_types.items()}
        aliases = [f"{name} is --model_family={sets['model_family']} --model_type={sets['model_type']}" for name, sets in further.items()]
        text = f"{item.help} {'; '.join(aliases)}." if aliases else item.help
        return dataclasses.replace(item, choices=(*item.choices, *further), choice_aliases=further, help=text)

    def readers(self, item: Option) -> tuple[FamilyFacts, ...]:
        """The families that read an option."""
        return tuple(family for family in self.families.values() if family.reads(item))
