"""Everything that can be chosen on the three axes, collected for the launcher, the trainer and other programs that read settings."""

from __future__ import annotations

from helpers.config.axes import Axes
from helpers.families import family_facts
from helpers.methods import METHODS
from helpers.objectives import OBJECTIVES


def known_axes() -> Axes:
    """What every family, method and objective declares, and all options; imports nothing heavy."""
    methods = {name: METHODS[name].facts for name in METHODS}
    return Axes(family_facts(), methods, {name: OBJECTIVES[name].facts for name in OBJECTIVES})
