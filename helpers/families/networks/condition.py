"""The ControlNet's conditioning image: from a batch to the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from helpers.data.batches import Batch

NAME = "condition"


def of_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The conditioning images of a batch as an entry for `conditioning`; empty if the batch has none."""
    return {} if batch.condition is None else {NAME: batch.condition.to(device)}


def keyword(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    """The additional argument of a network with a ControlNet (see controlnet.py); empty for other networks."""
    return {NAME: conditioning[NAME]} if NAME in conditioning else {}
