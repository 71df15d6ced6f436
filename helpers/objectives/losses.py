"""The loss between prediction and target, shared by all objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.protocols import Corrupted


def weighted_loss(prediction: Tensor, corrupted: Corrupted, options: ObjectiveOptions, mask: Tensor | None = None) -> Tensor:
    """(B,) mean of --loss over channels and pixels, times each sample's weight; computed in float32.

    With a mask m (B, 1, h, w), at least 0 and not all 0 in a sample, the mean is sum(m d) / sum(m): each pixel counts by its mask, and a
    sample counts as much as one without a mask, however little of it is masked. Where m is 0, the gradient is exactly 0.
    """
    error = prediction.float() - corrupted.target.float()
    distance = huber(error, options.huber_delta) if options.loss == "huber" else error**2
    dims = tuple(range(1, distance.ndim))
    if mask is None:
        return distance.mean(dim=dims) * corrupted.weight
    return (distance * mask).mean(dim=dims) / mask.mean(dim=dims) * corrupted.weight


def huber(error: Tensor, delta: float) -> Tensor:
    """Huber (1964), elementwise: e^2 up to |e| = delta, then delta (2 |e| - delta), a straight line with the same slope at delta.

    This is twice the usual definition, so that small errors count as in the mean squared error, and the same learning rates fit.
    """
    size = error.abs()
    within = size.clamp(max=delta)
    return within * (2 * size - within)
