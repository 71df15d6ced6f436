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
from helpers.families import family_facts
from helpers.families.loading.recognize import family_of, recognize
from helpers.families.tiny import MINIATURES
from tests.families.conftest import family_name, open_family


def recognized(asked: str, model: Path) -> str:
    return recognize(asked, dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model)), CacheOptions())


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
    assert recognized(wrapper, miniature(name)) == family_name(name)


@pytest.mark.parametrize(
    ("name", "wrapper", "said"),
    [
        ("sdxl", "sd2x", "is of SDXL (StableDiffusionXLPipeline), not of Stable Diffusion 1 and 2: train it with ./train_sdxl.sh."),
        ("sdxl_refiner", "sd2x", "is of SDXL refiner (StableDiffusionXLImg2ImgPipeline), not of"),
        ("sd1", "sdxl", "is of Stable Diffusion 1 and 2 (StableDiffusionPipeline), not of SDXL: train it with ./train_sd2x.sh."),
        ("sd2", "sdxl", "train it with ./train_sd2x.sh."),
        ("sd3", "sdxl", "is of Stable Diffusion 3 (StableDiffusion3Pipeline), not of SDXL: train it with ./train_sd3.sh."),
        ("sdxl", "sd3", "is of SDXL (StableDiffusionXLPipeline), not of Stable Diffusion 3: train it with ./train_sdxl.sh."),
        (
            "deepfloyd_1",
            "sd2x",
            "is of DeepFloyd IF stage I (IFPipeline), not of Stable Diffusion 1 and 2: train it with ./train_sd2x.sh with",
        ),
        ("deepfloyd_2", "deepfloyd_1", "./train_sd2x.sh with MODEL_TYPE='deepfloyd-stage2-lora' or 'deepfloyd-stage2'."),
        ("deepfloyd_1", "deepfloyd_2", "./train_sd2x.sh with MODEL_TYPE='deepfloyd-lora' or 'deepfloyd-full'."),
        ("sd2", "deepfloyd_1", "not of DeepFloyd IF stage I: train it with ./train_sd2x.sh without MODEL_TYPE='deepfloyd-lora' or"),
        ("sdxl", "deepfloyd_1", "not of DeepFloyd IF stage I: train it with ./train_sdxl.sh without MODEL_TYPE='deepfloyd-lora' or"),
        ("sd3", "pixart_sigma", "not of PixArt Sigma: train it with ./train_sd3.sh without PIXART_SIGMA='true'."),
    ],
)
def test_a_base_model_of_another_wrapper_is_refused_with_its_name(
    name: str, wrapper: str, said: str, miniature: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError) as caught:
        recognized(wrapper, miniature(name))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_family_refuses_a_base_model_of_another(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    other = "sdxl" if name.startswith("sd1") or name == "sd2" else "sd2x"
    with pytest.raises(ModelError, match="not "):
        open_family(other, miniature(name), tmp_path)


@pytest.mark.parametrize(("name", "pipeline"), [(name, kind) for name, facts in family_facts().items() for kind in facts.pipelines])
def test_every_pipeline_of_a_family_is_recognized_or_refused_with_its_command(name: str, pipeline: str, tmp_path: Path) -> None:
    indexes = [{"_class_name": pipeline, "text_encoder": encoder} for encoder in (["transformers", "CLIPTextModel"], [None, None])]
    [index] = [index for index in indexes if family_facts()[name].accepts(index)][:1]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for asked, facts in family_facts().items():
        if facts.command == family_facts()[name].command:
            assert recognized(asked, tmp_path) == name
        else:
            with pytest.raises(ModelError, match=r"train it with \./train_\w+\.sh"):
                recognized(asked, tmp_path)


def test_no_model_index_belongs_to_two_families() -> None:
    for facts in family_facts().values():
        for pipeline in facts.pipelines:
            for encoder in (["transformers", "CLIPTextModel"], [None, None]):
                index = {"_class_name": pipeline, "text_encoder": encoder}
                accepting = [other.name for other in family_facts().values() if pipeline in other.pipelines and other.accepts(index)]
                assert len(accepting) == 1
                assert getattr(family_of(index), "name", None) == accepting[0]


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
    with pytest.raises(ModelError, match="has the pipeline StableDiffusionInpaintPipeline, which cannot be trained"):
        recognized("sd2x", copy)
