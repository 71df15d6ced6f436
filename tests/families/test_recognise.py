"""Which family a base model is of, and what is said to who brings another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.options import CacheOptions, ModelOptions
from helpers.errors import ModelError
from helpers.families.loading.recognise import FAMILY_OF_PIPELINE, KINDS, recognise
from helpers.families.tiny import MINIATURES
from tests.families.conftest import family_name, open_family


def recognised(asked: str, model: Path) -> str:
    return recognise(asked, dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model)), CacheOptions())


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("sd1", "sd2x"),
        ("sd2", "sd2x"),
        ("sdxl", "sdxl"),
        ("sdxl_refiner", "sdxl"),
        ("sd3", "sd3"),
        ("sd35", "sd3"),
        ("deepfloyd_1", "deepfloyd_1"),
        ("deepfloyd_2", "deepfloyd_2"),
    ],
)
def test_a_base_model_is_of_the_family_of_its_wrapper_or_of_one_that_shares_it(
    name: str, wrapper: str, miniature: Callable[[str], Path]
) -> None:
    assert recognised(wrapper, miniature(name)) == family_name(name)


@pytest.mark.parametrize(
    ("name", "wrapper", "said"),
    [
        ("sdxl", "sd2x", "is SDXL (a StableDiffusionXLPipeline), not Stable Diffusion 1 or 2: it is trained by ./train_sdxl.sh."),
        ("sdxl_refiner", "sd2x", "is the SDXL refiner (a StableDiffusionXLImg2ImgPipeline), not"),
        ("sd1", "sdxl", "is Stable Diffusion 1 or 2 (a StableDiffusionPipeline), not SDXL: it is trained by ./train_sd2x.sh."),
        ("sd2", "sdxl", "it is trained by ./train_sd2x.sh."),
        ("sd3", "sdxl", "is Stable Diffusion 3 (a StableDiffusion3Pipeline), not SDXL: it is trained by ./train_sd3.sh."),
        ("sdxl", "sd3", "is SDXL (a StableDiffusionXLPipeline), not Stable Diffusion 3: it is trained by ./train_sdxl.sh."),
        (
            "deepfloyd_1",
            "sd2x",
            "is DeepFloyd IF, stage I (an IFPipeline), not Stable Diffusion 1 or 2: it is trained by ./train_sd2x.sh with",
        ),
        ("deepfloyd_2", "deepfloyd_1", "./train_sd2x.sh with MODEL_TYPE='deepfloyd-stage2-lora' or 'deepfloyd-stage2'."),
        ("deepfloyd_1", "deepfloyd_2", "./train_sd2x.sh with MODEL_TYPE='deepfloyd-lora' or 'deepfloyd-full'."),
        ("sd2", "deepfloyd_1", "not DeepFloyd IF, stage I: it is trained by ./train_sd2x.sh without MODEL_TYPE='deepfloyd-lora' or"),
        ("sdxl", "deepfloyd_1", "not DeepFloyd IF, stage I: it is trained by ./train_sdxl.sh without MODEL_TYPE='deepfloyd-lora' or"),
        ("sd3", "pixart_sigma", "not PixArt Sigma: it is trained by ./train_sd3.sh without PIXART_SIGMA='true'."),
    ],
)
def test_a_base_model_of_another_wrapper_is_refused_with_its_name(
    name: str, wrapper: str, said: str, miniature: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError) as caught:
        recognised(wrapper, miniature(name))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_family_refuses_a_base_model_of_another(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    other = "sdxl" if name.startswith("sd1") or name == "sd2" else "sd2x"
    with pytest.raises(ModelError, match="not "):
        open_family(other, miniature(name), tmp_path)


@pytest.mark.parametrize("pipeline", FAMILY_OF_PIPELINE)
def test_every_pipeline_that_is_known_is_told_from_the_others(pipeline: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "text_encoder": ["transformers", "CLIPTextModel"]}))
    for asked in ("sd2x", "sdxl", "sd3"):
        if KINDS[FAMILY_OF_PIPELINE[pipeline]].command == KINDS[asked].command:
            assert recognised(asked, tmp_path) == FAMILY_OF_PIPELINE[pipeline]
        else:
            with pytest.raises(ModelError, match=r"it is trained by \./train_\w+\.sh"):
                recognised(asked, tmp_path)


def test_weights_in_a_format_that_runs_code_are_named_at_once(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "old"
    shutil.copytree(miniature("sd1"), copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"old/unet are no \.safetensors"):
        open_family("sd2x", copy, tmp_path)


def test_a_pipeline_that_nothing_trains_is_named(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "inpainting"
    shutil.copytree(miniature("sd1"), copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    with pytest.raises(ModelError, match="is a StableDiffusionInpaintPipeline, which cannot be trained here"):
        recognised("sd2x", copy)
