from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from demo import check
from demo.drawings import CONCEPT, Scene

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return check.prompts(24)


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> list[Image.Image]:
    return check.generate(MODEL, scenes)


def passes(scenes: list[Scene], images: list[Image.Image]) -> bool:
    scores = check.score(scenes, [check.judge(image) for image in images])
    return all(scores[measure] >= threshold for measure, threshold in check.THRESHOLDS.items())


def test_the_embedded_model_shows_what_its_prompts_ask_for(scenes: list[Scene], images: list[Image.Image]) -> None:
    assert passes(scenes, images)


def test_the_check_fails_on_shuffled_prompts(scenes: list[Scene], images: list[Image.Image]) -> None:
    assert not passes(check.shuffled(scenes), images)


def test_the_check_fails_on_an_untrained_network(scenes: list[Scene], tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, local_files_only=True)
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(pipeline.unet.config))
    pipeline.save_pretrained(tmp_path)
    assert not passes(scenes[:12], check.generate(tmp_path, scenes[:12]))


def test_the_embedded_model_does_not_know_the_concept() -> None:
    scenes = check.prompts(12, shapes=(CONCEPT,))
    seen = [check.judge(image) for image in check.generate(MODEL, scenes)]
    assert check.score(scenes, seen)["shape"] <= 0.25


def test_the_embedded_model_is_a_few_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 8_000_000
