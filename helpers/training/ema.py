"""Exponential moving average of the trained weights, always in float32: in bfloat16 its small updates would be rounded away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from helpers.config.options import EmaOptions


def warmed_decay(decay: float, update: int) -> float:
    """Decay of update n, from 1: min(decay, (1 + n) / (10 + n)), so that the initial weights are soon forgotten."""
    return min(decay, (1 + update) / (10 + update))


class Average:
    """A float32 copy of the parameters, updated every `interval` optimizer steps with the decay of all those steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: EmaOptions) -> None:
        self.parameters = parameters
        self.decay = options.ema_decay
        self.interval = options.ema_update_interval
        device = torch.device("cpu") if options.ema_device == "cpu" else None
        self.shadow = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True) for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, optimizer_step: int) -> None:
        """After optimizer step n, from 1: shadow <- d shadow + (1 - d) weights, with d = decay(n)^interval."""
        if optimizer_step % self.interval:
            return
        decay = warmed_decay(self.decay, optimizer_step) ** self.interval
        shadows = list(self.shadow.values())
        weights = [self.parameters[name].detach().to(shadow.device, torch.float32) for name, shadow in self.shadow.items()]
        torch._foreach_lerp_(shadows, weights, 1 - decay)  # one kernel for all tensors, if the device has one

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the network uses the average. Afterwards the live weights are restored bit for bit."""
        live = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._put(self.shadow)
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
