"""Everything that can be chosen on the three axes, for whoever reads settings: the launcher and the trainer."""

from __future__ import annotations

from helpers.config.read import FactsByAxis
from helpers.families import family_facts
from helpers.methods import METHODS
from helpers.objectives import OBJECTIVES


def known_facts() -> FactsByAxis:
    """What every family, method and objective declares; imports nothing heavy."""
    methods = {name: METHODS[name].facts for name in METHODS}
    return FactsByAxis(family_facts(), methods, {name: OBJECTIVES[name].facts for name in OBJECTIVES})
