from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo import check
from demo.drawings import COLORS, CONCEPT, SHAPES, Scene, draw, random_scene


def test_the_judge_recognizes_every_shape_and_pair_of_colors() -> None:
    for shape, foreground, background in itertools.product(check.ALL_SHAPES, COLORS, COLORS):
        if foreground != background:
            scene = Scene(shape, foreground, background)
            assert check.judge(draw(scene)) == check.Seen(foreground, background, shape), scene.caption


@pytest.mark.parametrize("blur_px", [1.0, 1.5])
def test_the_judge_tolerates_blur_position_and_size(blur_px: float) -> None:
    rng = random.Random(3)
    scenes = [random_scene(rng, check.ALL_SHAPES) for _ in range(100)]
    seen = [check.judge(draw(scene).filter(ImageFilter.GaussianBlur(blur_px))) for scene in scenes]
    assert min(check.score(scenes, seen).values()) >= 0.97


def test_an_empty_image_shows_no_shape() -> None:
    assert check.judge(Image.new("RGB", (64, 64), COLORS["green"])) == check.Seen(None, "green", None)


def test_noise_shows_no_shape() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    assert all(check.judge(Image.fromarray(image)).shape is None for image in noise)


def test_shuffled_prompts_fail_on_perfect_images() -> None:
    scenes = check.prompts(48)
    seen = [check.judge(draw(scene)) for scene in scenes]
    assert set(check.score(scenes, seen).values()) == {1.0}
    scores = check.score(check.shuffled(scenes), seen)
    assert all(scores[measure] < threshold for measure, threshold in check.THRESHOLDS.items())


def test_prompts_ask_for_all_shapes_equally_and_never_for_one_color_on_itself() -> None:
    scenes = check.prompts(48)
    assert [sum(scene.shape == shape for scene in scenes) for shape in SHAPES] == [16, 16, 16]
    assert all(scene.foreground != scene.background for scene in scenes)
    assert {scene.shape for scene in check.prompts(4, shapes=(CONCEPT,))} == {CONCEPT}


def test_the_sheet_frames_wrong_images(tmp_path: Path) -> None:
    scenes = [Scene("circle", "red", "blue"), Scene("square", "white", "black")]
    images = [draw(scenes[0]), draw(scenes[0])]
    check.write_sheet(images, scenes, [check.judge(image) for image in images], tmp_path / "sheet.png", columns=2)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.getpixel((1, 1)) == (255, 255, 255) and sheet.getpixel((73, 1)) == (220, 0, 0)
