"""Training objectives: what the network learns to predict. One file an objective, one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.registry import Registry

if TYPE_CHECKING:
    from helpers.protocols import ObjectiveClass

OBJECTIVES: Registry[ObjectiveClass] = Registry(
    {
        "diffusion": "helpers.objectives.diffusion:Diffusion",
        "flow": "helpers.objectives.flow:FlowMatching",
    }
)
