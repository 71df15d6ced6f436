"""The families of base models that can be trained: one file a family, one line here. The first is the default of --model_family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.config.facts import FamilyFacts
from helpers.registry import Registry

if TYPE_CHECKING:
    from helpers.protocols import FamilyClass

FAMILIES: Registry[FamilyClass] = Registry(
    {
        "sdxl": "helpers.families.sdxl:SDXL",
        "sdxl_refiner": "helpers.families.sdxl_refiner:SDXLRefiner",
        "sd2x": "helpers.families.sd:StableDiffusion",
        "sd3": "helpers.families.sd3:StableDiffusion3",
        "flux": "helpers.families.flux:Flux",
        "pixart_sigma": "helpers.families.pixart:PixArtSigma",
        "pixart_alpha": "helpers.families.pixart:PixArtAlpha",
        "hunyuan_dit": "helpers.families.hunyuan_dit:HunyuanDiT",
        "deepfloyd_1": "helpers.families.deepfloyd:StageOne",
        "deepfloyd_2": "helpers.families.deepfloyd:StageTwo",
    }
)


def family_facts() -> dict[str, FamilyFacts]:
    """What every family declares, by name; imports the families' modules, but neither torch nor diffusers."""
    return {name: FAMILIES[name].facts for name in FAMILIES}
