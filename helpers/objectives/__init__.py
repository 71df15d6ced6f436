"""Which loss moves the weights. One file an objective, one line here."""

from __future__ import annotations

from helpers.registry import Registry

OBJECTIVES: Registry = {
    "diffusion": "helpers.objectives.diffusion:Diffusion",
    "flow": "helpers.objectives.flow:FlowMatching",
}
