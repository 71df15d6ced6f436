"""Gradients that add up in float32 although the weights have fewer bits."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


class Float32Gradients:
    """The sum of a step's gradients, of which each micro-batch's is rounded once, and not the sum again and again.

    bfloat16 has 8 bits for a number: of a sum of many micro-batches, most of what the later ones add is lost.
    """

    def __init__(self, parameters: Collection[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: dict[nn.Parameter, Tensor] = {}

    def take(self) -> None:
        """Add the gradients that a micro-batch left, and leave none."""
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter in self.sums:
                self.sums[parameter] += parameter.grad
            else:
                self.sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def give(self, processes: int) -> None:
        """Leave the mean over all processes as the gradients, rounded to the weights' precision. To be called by all of them."""
        for parameter, total in self.sums.items():
            if processes > 1:
                torch.distributed.all_reduce(total)
                total /= processes
            parameter.grad = total.to(parameter.dtype)
        self.sums = {}
