"""Gradient accumulation in float32 for weights of lower precision."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


class Float32Gradients:
    """Sums a step's gradients in float32, so that only each micro-batch's gradient is rounded, not the running sum.

    bfloat16 has 8 bits of mantissa: a sum over many micro-batches would lose most of what the later ones add.
    """

    def __init__(self, parameters: Collection[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: dict[nn.Parameter, Tensor] = {}

    def take(self) -> None:
        """Add the gradients of a micro-batch to the sums, and clear them."""
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter in self.sums:
                self.sums[parameter] += parameter.grad
            else:
                self.sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def give(self, processes: int) -> None:
        """Set the gradients to the mean over all processes, rounded to the weights' precision. Every process must call it."""
        for parameter, total in self.sums.items():
            if processes > 1:
                torch.distributed.all_reduce(total)
                total /= processes
            parameter.grad = total.to(parameter.dtype)
        self.sums = {}
