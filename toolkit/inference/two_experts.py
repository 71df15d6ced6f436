"""Two networks that act as one, each on its part of the noise schedule (Balaji et al., 2022, "eDiff-I")."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class TwoExperts(nn.Module):
    """Uses `late` at timesteps below `border`, where little noise is left, and `early` at all others.

    It replaces the network of a diffusers pipeline: `pipeline.unet = TwoExperts(pipeline.unet, late, 200)`. All other attributes of the
    network, such as its config, are those of `early`.
    """

    def __init__(self, early: nn.Module, late: nn.Module, border: float) -> None:
        super().__init__()
        self.early = early
        self.late = late
        self.border = border
        self._bind = inspect.signature(early.forward).bind  # some pipelines pass the timestep by position, others by name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        timestep = torch.as_tensor(self._bind(*args, **kwargs).arguments["timestep"])
        expert = self.late if timestep.max() < self.border else self.early  # one timestep for the whole batch
        return expert(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("early"), name)
