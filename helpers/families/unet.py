"""Loading the U-Nets of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.families.checkpoint import Checkpoint
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch


def load_unet(base: Checkpoint, dtype: torch.dtype | None) -> Parts:
    from diffusers import UNet2DConditionModel

    return Parts(base.load(UNet2DConditionModel, "unet", dtype), "unet")
