"""Sizes and cuts of datasets: what is refused, what has no effect, and the user's own sizes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.config.aspects import AspectBucket, BucketSize
from helpers.config.config import Config
from helpers.config.sizes import FACE_CASCADE

Read = Callable[..., Config]
Refuse = Callable[..., str]
Write = Callable[..., None]

IMAGES: dict[str, Any] = {"id": "a", "instance_data_dir": "images"}
CROPPED = {**IMAGES, "crop": True}
RANDOM = {**CROPPED, "crop_aspect": "random"}


def test_shapes_are_numbers_or_objects_with_relative_weights(read: Read, write_data: Write) -> None:
    write_data([{**RANDOM, "crop_aspect_buckets": [1, 0.75, {"aspect": 1.5, "weight": 3}, {"aspect": 2}]}])
    config = read()
    assert config.datasets[0].crop_aspect_buckets == (AspectBucket(1), AspectBucket(0.75), AspectBucket(1.5, 3), AspectBucket(2))
    assert config.notes == ()
    json.dumps(config.to_json())


@pytest.mark.parametrize(
    ("buckets", "said"),
    [
        (["1.5"], "datasets[0].crop_aspect_buckets: element 0 has the aspect '1.5'; write width / height as a number"),
        ([1, True], "element 1 has the aspect True"),
        ([0], "element 0 has the aspect 0; width / height must be between 0.02 and 50"),
        ([{"aspect": 51}], "element 0 has the aspect 51; width / height must be between 0.02 and 50"),
        ([{"aspect_bucket": 1.5, "weight": 1}], "element 0 has the key 'aspect_bucket'; write a number, or {\"aspect\": 1.5"),
        ([{"weight": 1}], 'element 0 has no "aspect"; write a number'),
        ([{"aspect": 1.5, "weight": 0}], "element 0 has the weight 0; it must be a number above 0 and at most 1000000"),
        ([{"aspect": 1.5, "weight": "2"}], "element 0 has the weight '2'; it must be a number above 0"),
        (1.5, "datasets[0].crop_aspect_buckets is the number 1.5; it must be a list"),
        ([], "dataset 'a': crop_aspect random needs crop_aspect_buckets, the shapes to draw from"),
    ],
)
def test_a_shape_that_is_none_is_refused(buckets: Any, said: str, write_data: Write, refuse: Refuse) -> None:
    write_data([{**RANDOM, "crop_aspect_buckets": buckets}])
    assert said in refuse()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"maximum_image_size": 4}, "dataset 'a': maximum_image_size 4 needs target_downsample_size"),
        ({"target_downsample_size": 2}, "dataset 'a': target_downsample_size 2 needs maximum_image_size"),
        ({"maximum_image_size": 2, "target_downsample_size": 3}, "target_downsample_size 3 is above maximum_image_size 2"),
        ({"maximum_image_size": 2, "target_downsample_size": 0.5}, "target_downsample_size 0.5 is below the resolution 1,"),
        ({"maximum_image_size": 4, "target_downsample_size": 1024}, "target_downsample_size: 1024 megapixels; did you mean"),
        ({"maximum_image_size": 0, "target_downsample_size": 1}, "maximum_image_size: 0.0 is not above 0"),
    ],
)
def test_sizes_to_shrink_to_that_cannot_be_meant_are_refused(entry: dict[str, Any], said: str, write_data: Write, refuse: Refuse) -> None:
    write_data([{**CROPPED, **entry}])
    assert said in refuse()


def test_options_that_shrink_count_for_sets_of_their_own_unit(read: Read, write_data: Write) -> None:
    write_data([CROPPED, {**CROPPED, "id": "b", "resolution_type": "pixel", "resolution": 512}])
    first, second = read("--maximum_image_size=4", "--target_downsample_size=2").datasets
    assert (first.maximum_image_size, first.target_downsample_size) == (4, 2)
    assert (second.maximum_image_size, second.target_downsample_size) == (None, None)


def test_what_has_no_effect_beside_other_settings_says_so(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "crop_style": "face", "maximum_image_size": 4, "target_downsample_size": 2}])
    assert read().notes == tuple(
        f"data.json: datasets[0].{key} does nothing while crop is off."
        for key in ("crop_style", "maximum_image_size", "target_downsample_size")
    )
    write_data([{**CROPPED, "crop_aspect_buckets": [1]}])
    assert read().notes == ("data.json: datasets[0].crop_aspect_buckets does nothing while crop_aspect is square.",)
    write_data([IMAGES])
    shrinking = ("--maximum_image_size=4", "--target_downsample_size=2")
    assert [note for note in read(*shrinking).notes if note.startswith("--maximum_image_size does nothing while crop is off")]


def test_faces_need_a_library_that_has_a_detector(write_data: Write, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data([{**CROPPED, "crop_style": "face"}])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "torch" else None)
    assert refuse("--report_to=none") == (
        "dataset 'a': crop_style face needs the face detector of OpenCV 4, which OpenCV 5 no longer has;"
        " .venv/bin/pip install -c constraints/pins.txt opencv-python-headless, or choose another crop_style."
    )


def test_a_detector_is_known_by_its_file(folder: Path, write_data: Write, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data([{**CROPPED, "crop_style": "face"}])
    library = importlib.util.spec_from_loader("cv2", None, is_package=True)
    assert library is not None
    library.submodule_search_locations = [str(folder / "cv2")]
    (folder / "cv2" / "data").mkdir(parents=True)
    (folder / "cv2" / "data" / FACE_CASCADE).write_text("<opencv_storage/>")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: library)
    assert read().datasets[0].crop_style == "face"


def test_the_alignment_is_one_of_two(refuse: Refuse) -> None:
    assert refuse("--aspect_bucket_alignment=16") == "--aspect_bucket_alignment: 16 is neither 8 nor 64; use one of them."


def write_map(folder: Path, content: Any, name: str = "aspect_resolution_map-1.0.json") -> None:
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", ["aspect_resolution_map-1.0.json", "aspect_resolution_map-1.json", "aspect_resolution_map-1.00.json"])
def test_sizes_of_ones_own_are_read_from_the_output_folder(name: str, folder: Path, read: Read, write_data: Write) -> None:
    write_map(folder, {"1.46": [1152, 768], "0.68": [768, 1152]}, name)
    write_data([IMAGES, {**IMAGES, "id": "b", "resolution": 0.5}])
    first, second = read("--output_dir=out").datasets
    assert first.bucket_sizes == (BucketSize(0.68, 768, 1152), BucketSize(1.46, 1152, 768))
    assert second.bucket_sizes == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"1.46": [1216, 830]},
            '"1.46" has the size 1216x830; both sides must be multiples of 64 (out/aspect_resolution_map-1.0.json, line 1)',
        ),
        ({"1.46": [0, 64]}, "has the size 0x64; both sides must be multiples of 64"),
        ({"1.46": "1216x832"}, '"1.46" must have a size such as [1216, 832]'),
        ({"1.46": [1216.0, 832]}, '"1.46" must have a size such as [1216, 832]'),
        ({"wide": [1216, 832]}, '"wide" is no aspect; write width / height as a number in quotes'),
        ({"nan": [1216, 832]}, '"nan" is not an aspect ratio of an image'),
        ({"1.4615": [1216, 832]}, '"1.4615" has more than 2 decimals and would fit no bucket; round it, or raise --aspect_bucket_rounding'),
        ({"1.5": [1216, 832], "1.50": [1152, 768]}, '"1.50" says the same aspect a second time'),
        ({"1.0": [8192, 8192]}, '"1.0" has the size 8192x8192; nothing is trained above 32 megapixels'),
        ([1], 'must hold an object such as {"1.46": [1216, 832]}'),
        ('{"1.46": [1216, 832]', "out/aspect_resolution_map-1.0.json, line 1"),
    ],
)
def test_a_size_that_cannot_be_trained_at_is_refused(content: Any, said: str, folder: Path, refuse: Refuse) -> None:
    write_map(folder, content)
    assert said in refuse("--output_dir=out")


def test_decimals_and_alignment_of_the_file_follow_the_options(folder: Path, read: Read) -> None:
    write_map(folder, {"1.4615": [1208, 824]})
    flags = ("--output_dir=out", "--aspect_bucket_rounding=4", "--aspect_bucket_alignment=8")
    assert read(*flags).datasets[0].bucket_sizes == (BucketSize(1.4615, 1208, 824),)


def test_two_files_for_one_resolution_are_one_too_many(folder: Path, refuse: Refuse) -> None:
    for name in ("1", "1.0"):
        write_map(folder, {}, f"aspect_resolution_map-{name}.json")
    assert "are for the same resolution; remove one" in refuse("--output_dir=out")


def test_a_file_that_is_for_no_data_set_says_so(folder: Path, read: Read) -> None:
    for name in ("aspect_resolution_map-0.75.json", "aspect_resolution_map-mine.json"):
        write_map(folder, {"1.46": [1152, 768]}, name)
    said = "does nothing: no dataset has the resolution in its name, only 1."
    assert read("--output_dir=out").notes == tuple(f"out/aspect_resolution_map-{name}.json {said}" for name in ("0.75", "mine"))


def test_a_file_for_pixels_does_nothing_and_says_so(folder: Path, read: Read, write_data: Write) -> None:
    write_map(folder, {"1.5": [768, 512]}, "aspect_resolution_map-512.json")
    write_data([{**IMAGES, "resolution": 512, "resolution_type": "pixel"}])
    [note] = read("--output_dir=out").notes
    assert note == "out/aspect_resolution_map-512.json does nothing for dataset 'a': only sizes of resolution_type area have such a file."
