"""Samplers for validation, by the names users know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAMPLERS = {
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def sampler(name: str, schedule: Mapping[str, Any], spacing: str) -> Any:
    """A diffusers scheduler that follows the noise schedule the network was trained on."""
    import diffusers

    kind = getattr(diffusers, SAMPLERS[name])
    return kind.from_config({**schedule, "timestep_spacing": spacing})
