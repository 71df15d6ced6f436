"""Names of choices => where they live, loaded only when chosen. Each axis is one dict of one line an entry."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from helpers.config.facts import Facts

Registry = Mapping[str, str]  # name -> "package.module:Class"


def load(registry: Registry, name: str) -> Any:
    """The class behind a name. An unknown name is a bug: settings have been judged before."""
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def facts(registry: Registry) -> dict[str, Facts]:
    """What every choice of an axis says of the settings. Imports the choices' modules, which import nothing heavy themselves."""
    return {name: load(registry, name).facts for name in registry}
