"""Faces are looked for once, remembered by content, and cut around. Where no detector is installed a bright square stands for a face."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from helpers.config.sizes import finds_faces
from helpers.data.base.images import decode
from helpers.data.base.workers import Workers
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.faces import CascadeDetector, Middle, face_middles, find_faces
from helpers.data.catalogue.scan import DatasetRules, scan
from helpers.data.plan.buckets import BucketPlan
from helpers.data.plan.targets import ResolutionRule
from helpers.data.planning import load_plan
from helpers.data.prepare import prepare_data
from helpers.errors import Interrupted, StorageError
from tests.data.toys import Story, ToyFamily, dataset, settings
from tests.storage.memory import MemoryBackend

RULES = DatasetRules("a", ResolutionRule(crop=True, crop_style="face"), CaptionRule("filename"))
PHOTOS = Path(__file__).resolve().parent.parent.parent / "demo" / "photos"


def brightest(image: Image.Image) -> Middle | None:
    """The middle of what is white."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) > 200)
    return (float(columns.mean() + 0.5) / image.width, float(rows.mean() + 0.5) / image.height) if len(rows) else None


def shown(size: tuple[int, int], spot: tuple[int, int] | None, orientation: int = 1) -> bytes:
    """A dark picture with a white square of 16 pixels around a spot."""
    image = Image.new("RGB", size, (20, 20, 60))
    if spot:
        image.paste((255, 255, 255), (spot[0] - 8, spot[1] - 8, spot[0] + 8, spot[1] + 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, exif=exif)
    return stream.getvalue()


FILES = {"left.jpg": shown((320, 160), (60, 80)), "none.jpg": shown((320, 160), None), "right.jpg": shown((1280, 640), (1040, 320))}


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.sqlite") as opened:
        yield opened


def look(store: MemoryBackend, catalogue: Catalogue, detector: object = brightest) -> int:
    scan(store, RULES, catalogue)
    return find_faces(store, "a", catalogue, lambda: detector, threads=2)  # type: ignore[arg-type,return-value]


def test_the_middle_of_a_face_is_a_share_of_the_picture_from_its_top_left(catalogue: Catalogue) -> None:
    assert look(MemoryBackend(FILES), catalogue) == 3
    x, y = face_middles(catalogue, "a")
    np.testing.assert_allclose(x, [60 / 320, np.nan, 1040 / 1280], atol=0.01)
    np.testing.assert_allclose(y, [0.5, np.nan, 0.5], atol=0.01)


def test_a_picture_on_its_side_is_looked_at_upright(catalogue: Catalogue) -> None:
    assert look(MemoryBackend({"turned.jpg": shown((320, 160), (60, 40), orientation=6)}), catalogue) == 1
    (x,), (y,) = face_middles(catalogue, "a")
    assert (x, y) == (pytest.approx(1 - 40 / 160, abs=0.02), pytest.approx(60 / 320, abs=0.02))


def test_a_picture_is_opened_once_and_again_when_it_changed(catalogue: Catalogue) -> None:
    store = MemoryBackend(FILES)
    look(store, catalogue)

    def unused() -> None:
        raise AssertionError("no detector is needed")

    assert find_faces(store, "a", catalogue, unused) == 0  # type: ignore[arg-type]
    store.write("none.jpg", shown((320, 160), (260, 80)))
    assert look(store, catalogue) == 1
    assert face_middles(catalogue, "a")[0][1] == pytest.approx(260 / 320, abs=0.01)


def test_a_damaged_picture_has_no_face_and_is_left_to_whoever_encodes_it(catalogue: Catalogue) -> None:
    whole = shown((320, 160), (60, 80))
    assert look(MemoryBackend({"damaged.jpg": whole[: len(whole) // 2]}), catalogue) == 1
    assert np.isnan(face_middles(catalogue, "a")[0]).all()


def test_a_picture_that_vanished_is_tried_again(catalogue: Catalogue) -> None:
    store = MemoryBackend(FILES)
    scan(store, RULES, catalogue)
    kept = store.read("left.jpg")
    store.delete("left.jpg")
    assert find_faces(store, "a", catalogue, lambda: brightest) == 3
    assert np.isnan(face_middles(catalogue, "a")[0][0])
    store.write("left.jpg", kept)
    assert find_faces(store, "a", catalogue, lambda: brightest) == 1
    assert not np.isnan(face_middles(catalogue, "a")[0][0])


def test_a_store_that_fails_is_told_by_name(catalogue: Catalogue) -> None:
    class Failing(MemoryBackend):
        def read(self, key: str) -> bytes:
            raise OSError(5, "Input/output error")

    scan(MemoryBackend(FILES), RULES, catalogue)
    with pytest.raises(StorageError, match="memory: left.jpg could not be read: Input/output error"):
        find_faces(Failing(), "a", catalogue, lambda: brightest)


def test_what_was_found_before_a_stop_is_kept(catalogue: Catalogue) -> None:
    store, seen = MemoryBackend(FILES), []

    def detector(image: Image.Image) -> Middle | None:
        seen.append(image.size)
        return brightest(image)

    scan(store, RULES, catalogue)
    with pytest.raises(Interrupted, match="stopped while images were searched"):
        find_faces(store, "a", catalogue, lambda: detector, threads=1, should_stop=lambda: bool(seen))
    assert len(seen) == 1
    assert find_faces(store, "a", catalogue, lambda: brightest, threads=1) == 2


def test_training_pictures_are_cut_around_faces_and_those_without_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.data.scanning.find_faces", functools.partial(find_faces, detector=lambda: brightest))
    (tmp_path / "data").mkdir()
    for name, data in FILES.items():
        (tmp_path / "data" / name).write_bytes(data)

    def prepared(**changed: object) -> tuple[BucketPlan, dict[str, object], list[str]]:
        story = Story()
        entry = dataset(
            tmp_path / "data", tmp_path / "cache", crop=True, crop_style="face", caption_strategy="filename", resolution=64, **changed
        )
        prepare_data([entry], settings(tmp_path / "output"), ToyFamily(), Workers(), story)  # type: ignore[arg-type]
        report = json.loads((tmp_path / "output" / "dataset_report.json").read_text())["datasets"][0]
        return load_plan(tmp_path / "output" / "cache" / "plan"), report, story.lines

    plan, report, lines = prepared()
    assert report["without_a_face"] == 1
    assert "faces: toys: none found in 1 of 3 images, which are cropped at the center" in lines
    assert [plan.geometry(index).left for index in range(3)] == [0, 32, 64]
    monkeypatch.setattr("helpers.data.catalogue.faces.decode", None)  # a second start looks at nothing
    again, *_ = prepared()
    assert again.fingerprint() == plan.fingerprint()


@pytest.mark.skipif(not finds_faces(), reason="no OpenCV with a face detector is installed")
@pytest.mark.parametrize(
    ("name", "middle"),
    [("astronaut.jpg", (0.43, 0.22)), ("bricks.tiff", None), ("cat.webp", None), ("coffee.jpg", None), ("flower.webp", None)],
)
def test_the_detector_finds_a_face_in_a_photograph_and_none_where_there_is_none(name: str, middle: Middle | None) -> None:
    image = decode((PHOTOS / name).read_bytes())
    found = CascadeDetector()(image)
    mirrored = CascadeDetector()(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    if middle is None:
        assert found is None
    else:
        assert found == pytest.approx(middle, abs=0.04)
        assert mirrored == pytest.approx((1 - middle[0], middle[1]), abs=0.04)
