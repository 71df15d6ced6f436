"""Loading diffusers' U-Nets, alone or with a ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.families.loading.base_model import BaseModel
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch

    from helpers.config.options import ModelOptions


UNET_OPTIONS = frozenset({"unet_attention_slice", "channels_last"})  # shared options that only U-Nets have


def load_unet(base: BaseModel, dtype: torch.dtype | None) -> Parts:
    from diffusers import UNet2DConditionModel

    return Parts(base.load(UNet2DConditionModel, "unet", dtype), "unet")


def controlnet_start(base: BaseModel, options: ModelOptions) -> Path | None:
    """The folder of the ControlNet to start from, or None if the user named none. Raises ModelError if it does not fit the U-Net."""
    if not options.controlnet:
        return None
    from helpers.families.networks.controlnet import OF_A_UNET, find_start

    return find_start(base, options, "ControlNetModel", "unet", OF_A_UNET)


def unet_and_controlnet(denoiser: Any) -> dict[str, Any]:
    """The network arguments of a pipeline: a U-Net, or a U-Net and its ControlNet."""
    if hasattr(denoiser, "controlnet"):
        return {"unet": denoiser.denoiser, "controlnet": denoiser.controlnet}
    return {"unet": denoiser}
