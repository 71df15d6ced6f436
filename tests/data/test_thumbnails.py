"""The thumbnails show what is trained: the same resize, the same flip, the same cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.data.base.sample import Size
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, scan
from helpers.data.plan.buckets import BucketPlan, DatasetColumns, ResolutionRule, plan
from helpers.data.report.survey import Thumbnail
from helpers.data.report.thumbnails import LONGER_SIDE, chosen, thumbnails
from helpers.storage.memo import Memo
from tests.storage.memory import MemoryBackend

RULE = ResolutionRule(128, "pixel", alignment=8, crop=True, crop_style="corner")


def quarters(width: int, height: int) -> bytes:
    """Red and green above, blue and white below."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class Opened(MemoryBackend):
    """Remembers what was read."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.keys: list[str] = []

    def read(self, key: str) -> bytes:
        self.keys.append(key)
        return super().read(key)


def made(source: Opened, folder: Path, flip: bool = False) -> list[Thumbnail]:
    with Catalogue(folder / "catalogue.sqlite") as catalogue:
        scan(source, DatasetRules("set", RULE, CaptionRule("filename")), catalogue)
        source.keys.clear()  # the scan looked at the headers
        found = catalogue.columns("set")
        flips = np.full(len(found.rows), flip)
        planned = plan([DatasetColumns("set", RULE, found.rows, found.width, found.height, flip=flips)])
        return thumbnails(planned, [source], catalogue, Memo(folder / "memo"), threads=2)


def colours(thumbnail: Thumbnail) -> list[tuple[int, ...]]:
    """Of the corners: above left, above right, below left, below right, each channel 0 or 1."""
    with Image.open(io.BytesIO(thumbnail.jpeg)) as image:
        width, height = image.size
        places = [(2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3)]
        return [tuple(round(value / 255) for value in image.getpixel(place)) for place in places]  # type: ignore[union-attr]


RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def test_a_thumbnail_is_cut_as_the_picture_is_trained(tmp_path: Path) -> None:
    [thumbnail] = made(Opened({"a_wide_one.png": quarters(512, 256)}), tmp_path)  # the cut keeps the right half
    assert colours(thumbnail) == [GREEN, GREEN, WHITE, WHITE]
    assert (thumbnail.key, thumbnail.caption, thumbnail.problem) == ("a_wide_one.png", "a wide one", "")


def test_a_mirrored_picture_is_shown_mirrored(tmp_path: Path) -> None:
    [thumbnail] = made(Opened({"wide.png": quarters(512, 256)}), tmp_path, flip=True)
    assert colours(thumbnail) == [RED, RED, BLUE, BLUE]


def test_a_second_start_opens_no_picture_that_has_not_changed(tmp_path: Path) -> None:
    files = {f"{name}.png": quarters(256, 256) for name in "abc"}
    source = Opened(files)
    first = made(source, tmp_path)
    assert sorted(source.keys) == sorted(files)
    assert made(source, tmp_path) == first and source.keys == []
    source = Opened(files | {"b.png": quarters(300, 200)})
    assert len(made(source, tmp_path)) == 3 and source.keys == ["b.png"]


def test_a_picture_that_cannot_be_decoded_is_shown_with_its_reason(tmp_path: Path) -> None:
    whole = quarters(256, 256)
    one, other = made(Opened({"half.png": whole[: len(whole) // 2], "whole.png": whole}), tmp_path)
    assert one.problem.startswith("unreadable: ") and one.jpeg == b""
    assert other.jpeg


def test_large_pictures_are_shown_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.data.test_thumbnails.RULE", ResolutionRule(1.0, "area"))
    [thumbnail] = made(Opened({"large.png": quarters(1536, 1024)}), tmp_path)
    with Image.open(io.BytesIO(thumbnail.jpeg)) as image:
        assert max(image.size) == LONGER_SIDE
    assert thumbnail.geometry.target == Size(1216, 832)


def planned(*counts: int) -> BucketPlan:
    """One dataset with so many pictures of each of several shapes."""
    sizes = [(64 * (index + 1), 64) for index, count in enumerate(counts) for _ in range(count)]
    width, height = (np.array(side) for side in zip(*sizes, strict=True))
    rule = ResolutionRule(64, "pixel", alignment=64)
    return plan([DatasetColumns("set", rule, np.arange(len(sizes)), width, height)])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((3,), [0, 1, 2]),
        ((100,), [12, 37, 62, 87]),  # spread evenly
        ((50, 50), [12, 37, 62, 87]),
        ((1, 97), [17, 49, 81, 0]),  # the commonest first, every shape there
        ((1, 1, 1, 1, 1, 5), [7, 0, 1, 2]),  # more shapes than pictures to show
    ],
)
def test_every_shape_is_shown_while_there_is_room(counts: tuple[int, ...], expected: list[int]) -> None:
    assert chosen(planned(*counts), 0, 4) == expected
