"""Samplers for validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sampler(kind: str, schedule: Mapping[str, Any], spacing: str) -> Any:
    """A diffusers scheduler of this class with the schedule that the network is trained on.

    `spacing` is its `timestep_spacing`, for schedules that have one: flow schedules have none.
    """
    import diffusers

    own = {"timestep_spacing": spacing} if "timestep_spacing" in schedule else {}
    return getattr(diffusers, kind).from_config({**schedule, **own})
