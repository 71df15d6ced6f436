"""How the condition of a ControlNet goes from a batch to the network, for the families that can have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from helpers.data.batches import Batch

NAME = "condition"


def of_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What a family tells its network beside the rest; nothing where the images have no conditions."""
    return {} if batch.condition is None else {NAME: batch.condition.to(device)}


def keyword(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    """The argument that a network with a ControlNet takes beside its own (see controlnet.py), and no other network does."""
    return {NAME: conditioning[NAME]} if NAME in conditioning else {}
