"""Which network. One file a family, one line here."""

from __future__ import annotations

from helpers.registry import Registry

FAMILIES: Registry = {
    "deepfloyd_1": "helpers.families.deepfloyd:StageOne",
    "deepfloyd_2": "helpers.families.deepfloyd:StageTwo",
    "hunyuan_dit": "helpers.families.hunyuan_dit:HunyuanDiT",
    "pixart_alpha": "helpers.families.pixart:PixArtAlpha",
    "pixart_sigma": "helpers.families.pixart:PixArtSigma",
    "sd2x": "helpers.families.sd:StableDiffusion",
    "sd3": "helpers.families.sd3:StableDiffusion3",
    "sdxl": "helpers.families.sdxl:SDXL",
    "sdxl_refiner": "helpers.families.sdxl_refiner:SDXLRefiner",
}
