"""What a base model is, by the pipeline class that its model_index.json names, and which wrapper trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families.loading.integrity import remedy

if TYPE_CHECKING:
    from helpers.config.options import CacheOptions, ModelOptions


@dataclass(frozen=True)
class Kind:
    """A family as a base model shows it, and how it is trained. Families of one command stand in for one another."""

    title: str
    wrapper: str
    setting: str = ""  # of the env file, that the wrapper trains it with

    @property
    def command(self) -> str:
        return f"{self.wrapper} with {self.setting}" if self.setting else self.wrapper


KINDS: Mapping[str, Kind] = {  # by the names of the families registry; those that it lacks yet are told apart all the same
    "sd2x": Kind("Stable Diffusion 1 or 2", "./train_sd2x.sh"),
    "sdxl": Kind("SDXL", "./train_sdxl.sh"),
    "sdxl_refiner": Kind("the SDXL refiner", "./train_sdxl.sh"),
    "sd3": Kind("Stable Diffusion 3", "./train_sd3.sh"),
    "pixart_sigma": Kind("PixArt Sigma", "./train_sdxl.sh", "PIXART_SIGMA='true'"),
    "pixart_alpha": Kind("PixArt Alpha", "./train_sdxl.sh", "PIXART_ALPHA='true'"),
    "hunyuan_dit": Kind("Hunyuan-DiT", "./train_sdxl.sh", "HUNYUAN_DIT='true'"),
    "deepfloyd_1": Kind("DeepFloyd IF, stage I", "./train_sd2x.sh", "MODEL_TYPE='deepfloyd-lora' or 'deepfloyd-full'"),
    "deepfloyd_2": Kind("DeepFloyd IF, stage II", "./train_sd2x.sh", "MODEL_TYPE='deepfloyd-stage2-lora' or 'deepfloyd-stage2'"),
}
FAMILY_OF_PIPELINE: Mapping[str, str] = {
    "StableDiffusionPipeline": "sd2x",
    "StableDiffusionImg2ImgPipeline": "sd2x",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "PixArtSigmaPipeline": "pixart_sigma",
    "PixArtAlphaPipeline": "pixart_alpha",
    "HunyuanDiTPipeline": "hunyuan_dit",
    "IFPipeline": "deepfloyd_1",
    "IFSuperResolutionPipeline": "deepfloyd_2",
}


def recognise(asked: str, options: ModelOptions, cache: CacheOptions) -> str:
    """The family that the base model is of, by its name in the registry; fetches the model if need be.

    It is `asked`, which the wrapper chose, or another that the same wrapper trains. Raises ModelError for any other, which says
    how to train it.
    """
    from helpers.families.loading.base_model import locate
    from helpers.families.loading.folder import model_index

    if asked not in KINDS:
        return asked  # a family that is not told apart here looks for itself
    found = locate(options, cache)
    index = model_index(found)
    family = family_of(index)
    if family is not None and KINDS[family].command == KINDS[asked].command:
        return family
    raise _other(found, index, asked)


def require_family(found: Path, index: Mapping[str, Any], family: str) -> None:
    """Raises ModelError unless a model folder with this model_index.json is of the family."""
    if family_of(index) != family:
        raise _other(found, index, family)


def family_of(index: Mapping[str, Any]) -> str | None:
    """What a model_index.json describes; None for what nothing here knows. SDXL's refiner is the one without a first text encoder."""
    family = FAMILY_OF_PIPELINE.get(str(index.get("_class_name")))
    if family == "sdxl" and (index.get("text_encoder") or [None])[0] is None:
        return "sdxl_refiner"
    return family


def _other(found: Path, index: Mapping[str, Any], asked: str) -> ModelError:
    if "_class_name" not in index:
        return ModelError(f"{found / 'model_index.json'} names no pipeline (_class_name): {remedy(found)}.")
    family = family_of(index)
    name, wanted = str(index.get("_class_name")), KINDS[asked]
    what = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if family is None:
        return ModelError(f"The model in {found} is {what}, which cannot be trained here; choose a base model that is {wanted.title}.")
    kind = KINDS[family]
    if kind.command == wanted.command:
        advice = "name another base model"
    elif wanted.setting and not kind.setting:  # the wrapper may be the right one already
        advice = f"it is trained by {kind.command} without {wanted.setting}"
    else:
        advice = f"it is trained by {kind.command}"
    return ModelError(f"The model in {found} is {kind.title} ({what}), not {wanted.title}: {advice}.")
