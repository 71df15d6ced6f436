"""Every family, method and objective has what its protocol names. mypy reads the tables here; the tests see that none is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers.choices import known_axes
from helpers.data.ports import EncodersApart
from helpers.families import FAMILIES
from helpers.families.deepfloyd import StageOne, StageTwo
from helpers.families.flux import Flux
from helpers.families.hunyuan_dit import HunyuanDiT
from helpers.families.pixart import PixArtAlpha, PixArtSigma
from helpers.families.sd import StableDiffusion
from helpers.families.sd3 import StableDiffusion3
from helpers.families.sdxl import SDXL
from helpers.families.sdxl_refiner import SDXLRefiner
from helpers.methods import METHODS
from helpers.methods.bitfit import BitFit
from helpers.methods.controlnet import ControlNet
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.methods.lycoris import Lycoris
from helpers.objectives import OBJECTIVES
from helpers.objectives.diffusion import Diffusion
from helpers.objectives.flow import FlowMatching
from helpers.protocols import (
    ControlNetFamily,
    FamilyClass,
    Img2ImgFamily,
    MethodClass,
    ObjectiveClass,
    TextTrainingFamily,
)

FAMILY_CLASSES: Mapping[str, FamilyClass] = {
    "sdxl": SDXL,
    "sdxl_refiner": SDXLRefiner,
    "sd2x": StableDiffusion,
    "sd3": StableDiffusion3,
    "flux": Flux,
    "pixart_sigma": PixArtSigma,
    "pixart_alpha": PixArtAlpha,
    "hunyuan_dit": HunyuanDiT,
    "deepfloyd_1": StageOne,
    "deepfloyd_2": StageTwo,
}
METHOD_CLASSES: Mapping[str, MethodClass] = {
    "full": FullFineTune,
    "bitfit": BitFit,
    "controlnet": ControlNet,
    "lora": Lora,
    "lycoris": Lycoris,
}
OBJECTIVE_CLASSES: Mapping[str, ObjectiveClass] = {"diffusion": Diffusion, "flow": FlowMatching}

# What only some families can do.
IMG2IMG: Mapping[str, type[Img2ImgFamily]] = {
    "sdxl": SDXL,
    "sdxl_refiner": SDXLRefiner,
    "sd2x": StableDiffusion,
    "sd3": StableDiffusion3,
    "deepfloyd_1": StageOne,
    "deepfloyd_2": StageTwo,
}
CONTROLNET: Mapping[str, type[ControlNetFamily]] = {"sdxl": SDXL, "sd2x": StableDiffusion, "sd3": StableDiffusion3}
TEXT_TRAINING: Mapping[str, type[TextTrainingFamily]] = {"sdxl": SDXL, "sd2x": StableDiffusion}
ENCODERS_APART: Mapping[str, type[EncodersApart]] = {"sd3": StableDiffusion3}


def test_mypy_reads_the_class_of_every_choice() -> None:
    for registry, classes in ((FAMILIES, FAMILY_CLASSES), (METHODS, METHOD_CLASSES), (OBJECTIVES, OBJECTIVE_CLASSES)):
        found: dict[str, Any] = {name: registry[name] for name in registry}
        assert found == classes


def test_every_choice_has_the_name_under_which_it_is_registered() -> None:
    known = known_axes()
    for facts in (known.families, known.methods, known.objectives):
        assert {name: one.name for name, one in facts.items()} == {name: name for name in facts}


def test_the_facts_of_a_family_declare_what_its_class_can_do() -> None:
    declared = known_axes().families.values()
    assert {family.name for family in declared if family.img2img} == set(IMG2IMG)
    assert {family.name for family in declared if family.controlnet} == set(CONTROLNET)
    assert {family.name for family in declared if family.trains_text_encoders} == set(TEXT_TRAINING)
    assert {family.name for family in declared if family.encoders_apart} == set(ENCODERS_APART)
