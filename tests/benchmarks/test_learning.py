"""benchmarks/learning.py measures on data that was not trained on, with measures that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from benchmarks import learning
from demo.drawings import COLORS, CONCEPT, Scene, draw


def captions(folder: Path) -> set[str]:
    return {file.read_text(encoding="utf-8").strip() for file in folder.glob("*.txt")}


def test_nothing_that_is_measured_was_trained_on(tmp_path: Path) -> None:
    measured = learning.held_out_stars()
    assert len(measured) == 48 and {star.shape for star in measured} == {CONCEPT}
    asked = {star.caption for star in measured}
    assert len(asked) == 16 and not asked & captions(learning.STARS)
    stars = learning.Bench(tmp_path).many_stars(80)
    assert captions(stars) == captions(learning.STARS) and len(list(stars.glob("*.png"))) == 80


def test_true_images_are_right_and_others_are_not() -> None:
    scenes = learning.held_out_stars()[:6]
    true = [draw(scene) for scene in scenes]
    assert learning.share_right(scenes, true) == 1
    assert learning.share_right(scenes, [Image.new("RGB", (64, 64), "gray")] * 6) == 0


def test_the_overlap_is_one_where_the_shape_stands_and_less_beside_it() -> None:
    scenes = [Scene("square", "red", "blue", radius=16.0), Scene("circle", "black", "white")]
    true = [draw(scene) for scene in scenes]
    assert learning.overlap(scenes, true) == 1
    assert learning.overlap(scenes, [ImageChops.offset(image, 8, 0) for image in true]) == pytest.approx(0.6, abs=0.1)
    silhouette = learning.silhouette(scenes[0])
    assert (silhouette.center, silhouette.radius, silhouette.shape) == ((32, 32), 16, "square")
    assert {silhouette.foreground, silhouette.background} <= set(COLORS)


def test_blurring_is_an_error_that_a_refiner_can_put_right() -> None:
    assert 1 < learning.error_of(None, [Scene("square", "red", "blue")]) < 20


def test_the_program_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        learning.main(["--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert all(part in said for part in learning.PARTS)
