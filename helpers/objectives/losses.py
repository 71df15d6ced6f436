"""How far the network's answer is from the right one: the part that all objectives share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.protocols import Corrupted


def weighted_loss(prediction: Tensor, corrupted: Corrupted, options: ObjectiveOptions) -> Tensor:
    """(B,) mean of --loss over channels and pixels, times the sample's weight; float32 whatever the network's precision."""
    error = prediction.float() - corrupted.target.float()
    distance = huber(error, options.huber_delta) if options.loss == "huber" else error**2
    return distance.mean(dim=tuple(range(1, distance.ndim))) * corrupted.weight


def huber(error: Tensor, delta: float) -> Tensor:
    """Huber (1964), elementwise: e^2 up to |e| = delta, then delta (2 |e| - delta), which goes on with the same slope.

    Twice what is often written, so that small errors count as they do in the mean squared error and learning rates carry over.
    """
    size = error.abs()
    within = size.clamp(max=delta)
    return within * (2 * size - within)
