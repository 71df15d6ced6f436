"""Two networks that answer as one, each in its part of the noise schedule (Balaji et al., 2022, "eDiff-I")."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class TwoExperts(nn.Module):
    """`late` answers where little noise is left, at timesteps below `border`; `early` answers before.

    It stands in a pipeline of diffusers where its network does: `pipeline.unet = TwoExperts(pipeline.unet, late, 200)`. What a pipeline
    asks of its network beside answers, such as its config, is `early`'s to tell.
    """

    def __init__(self, early: nn.Module, late: nn.Module, border: float) -> None:
        super().__init__()
        self.early = early
        self.late = late
        self.border = border
        self._bind = inspect.signature(early.forward).bind  # some pipelines give the timestep by its place, others by its name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        timestep = torch.as_tensor(self._bind(*args, **kwargs).arguments["timestep"])
        expert = self.late if timestep.max() < self.border else self.early  # one timestep for the whole batch
        return expert(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("early"), name)
