from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from demo.drawings import COLORS, CONCEPT, SHAPES, Scene, draw, random_scene, write_drawings

DEMO = Path(__file__).resolve().parents[2] / "demo"


def test_a_image_shows_its_two_colors_and_smooth_edges() -> None:
    pixels = np.asarray(draw(Scene("circle", "red", "blue")))
    assert pixels.shape == (64, 64, 3)
    assert tuple(pixels[32, 32]) == COLORS["red"] and tuple(pixels[0, 0]) == COLORS["blue"]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4


def test_every_shape_fits_into_the_image() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = random_scene(rng, [*SHAPES, CONCEPT])
        pixels = np.asarray(draw(scene)).astype(int)
        frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (frame == COLORS[scene.background]).all()


def test_captions_are_grammatical() -> None:
    assert Scene("circle", "red", "blue").caption == "a red circle on a blue background"
    assert Scene("square", "orange", "black").caption == "an orange square on a black background"


def test_the_same_seed_draws_the_same_images(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        write_drawings(tmp_path / name, 3, seed=seed)
    one, again, other = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "again", "other"))
    assert one == again != other


def test_the_committed_concept_is_what_the_program_draws() -> None:
    captions = sorted(file.read_text() for file in (DEMO / "concept").glob("*.txt"))
    assert len(captions) == len(list((DEMO / "concept").glob("*.png"))) == 40
    assert all(f" {CONCEPT} on a " in caption for caption in captions)


def test_every_photograph_opens_and_has_a_caption() -> None:
    photos = sorted(file for file in (DEMO / "photos").iterdir() if file.suffix != ".txt")
    assert len(photos) == 10
    for file in photos:
        assert file.with_suffix(".txt").read_text().strip()
        assert min(ImageOps.exif_transpose(Image.open(file)).size) >= 256


def test_the_photographs_have_mixed_formats_and_shapes_and_are_small() -> None:
    photos = [file for file in (DEMO / "photos").iterdir() if file.suffix != ".txt"]
    images = [Image.open(file) for file in photos]
    assert {image.format for image in images} == {"JPEG", "PNG", "WEBP", "TIFF", "AVIF"}
    assert {image.mode for image in images} == {"RGB", "L"}
    assert any(image.getexif().get(0x0112, 1) != 1 for image in images)
    assert sum(file.stat().st_size for file in photos) < 1_000_000


def test_every_photograph_names_its_source_and_license() -> None:
    listed = (DEMO / "PHOTOS.md").read_text()
    for file in (DEMO / "photos").iterdir():
        assert file.suffix == ".txt" or f"`{file.name}`" in listed
