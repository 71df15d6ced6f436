"""The conditions of images: found by name, cut to the pixel as the images are, read once, noticed when they change."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.config.datasets import DatasetConfig
from helpers.data import scanning
from helpers.data.base import images
from helpers.data.base.sample import Size
from helpers.data.base.workers import Workers
from helpers.data.batches import Batch
from helpers.data.catalogue.scan import same_shape
from helpers.data.encode.companions import packed, unpacked
from helpers.data.ports import ImageCodec, LatentSpec
from helpers.data.prepare import prepare_data
from helpers.data.training_data import TrainingData
from helpers.errors import DataError
from helpers.storage.local import LocalSource
from tests.data.test_prepare import damage
from tests.data.toys import ConvCodec, Story, ToyFamily, dataset, picture, settings

SIZES = [(96, 64), (64, 96), (80, 64)]  # at their own scale in a set of 64 pixels, so that nothing is resized but conditions


class PixelCodec:
    """Latents that are the pixels, to see what is cut where."""

    fingerprint = "pixels"

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"mean": pixels}


class PixelFamily(ToyFamily):
    latents = LatentSpec(channels=3, downsampling=1)
    condition_as_latents = False

    @contextmanager
    def image_codec(self, device: torch.device) -> Iterator[ImageCodec]:
        yield PixelCodec()  # type: ignore[misc]  # nothing is decoded


class LatentFamily(ToyFamily):
    condition_as_latents = True


def grid(width: int, height: int, scale: int = 1) -> Image.Image:
    """A picture whose colours tell each pixel's column and row; each `scale` times as wide and high where that is asked for."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns, rows, (columns * 7 + rows * 13) % 256], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


@dataclass
class Paired:
    """A folder of images with captions, a folder of conditions, and how to prepare them."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def conditions(self) -> Path:
        return self.root / "conditions"

    def prepare(self, family: ToyFamily | None = None, story: Story | None = None, nearest: bool = False, **changed: Any) -> TrainingData:
        in_settings = {name: changed.pop(name) for name in ("encode_while_training", "undecodable", "seed") if name in changed}
        cache = self.root / "output" / "cache"
        plain = {"caption_strategy": "instanceprompt", "instance_prompt": "a condition", "dataset_type": "conditioning"}
        conditions = dataset(self.conditions, cache, id="edges", resize_filter="nearest" if nearest else "lanczos", **plain)
        return prepare_data(
            [dataset(self.images, cache, condition=conditions, **changed)],
            settings(self.root / "output", **in_settings),
            family or PixelFamily(),  # type: ignore[arg-type]  # as much of a family as data needs
            Workers(),
            story or Story(),
        )

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "output" / "dataset_report.json").read_text())


@pytest.fixture
def paired(tmp_path: Path) -> Paired:
    """Nine coordinate grids, whose conditions are the same grids three times as large."""
    paired = Paired(tmp_path)
    for index in range(9):
        width, height = SIZES[index % 3]
        place = paired.images / "deep" / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        grid(width, height).save(place)
        place.with_suffix(".txt").write_text(f"caption number {index}")
        other = paired.conditions / "deep" / f"{index}.bmp"
        other.parent.mkdir(parents=True, exist_ok=True)
        grid(width, height, scale=3).save(other)
    return paired


def epochs(data: TrainingData, count: int = 1) -> list[Batch]:
    return [batch for step in data.steps(0, count * data.micro_batches_per_epoch) for batch in step]


def by_key(data: TrainingData) -> dict[str, Tensor]:
    found = {}
    for batch in epochs(data):
        assert batch.condition is not None
        found |= {sample.key: condition for sample, condition in zip(batch.samples, batch.condition, strict=True)}
    return found


# -- the cut ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redrawn", [False, True])
def test_a_condition_of_another_scale_is_cut_and_mirrored_with_its_image_to_the_pixel(redrawn: bool, paired: Paired) -> None:
    data = paired.prepare(nearest=True, crop=True, crop_style="random", flip=True, vae_cache_clear_each_epoch=redrawn)
    batches = epochs(data, 3)
    cuts = set()
    for batch in batches:
        assert batch.condition is not None and batch.condition.dtype == torch.float32 and batch.condition.shape == batch.latents.shape
        pixels = ((batch.latents + 1) * 127.5).round()
        assert (pixels - (batch.condition * 255).round()).abs().max() == 0
        assert batch.condition.min() >= 0 and batch.condition.max() <= 1
        cuts |= {(sample.key, cut.left, cut.top, cut.flip) for sample, cut in zip(batch.samples, batch.geometry, strict=True)}
    assert len({flip for *_, flip in cuts}) == 2 and len({(left, top) for _, left, top, _ in cuts}) > 4
    assert (len(cuts) > 9) == redrawn
    data.close()


def test_labels_stay_labels_where_the_set_asks_for_the_nearest(paired: Paired) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 7]], np.uint8)
    for place in paired.conditions.rglob("*.bmp"):
        width, height = (3 * edge // 2 for edge in Image.open(place).size)
        Image.fromarray(colours[np.random.default_rng(0).integers(0, 3, (height, width))]).save(place)
    seen = torch.cat([condition.flatten(1).T for condition in by_key(paired.prepare(nearest=True)).values()])
    assert {tuple(colour) for colour in (seen * 255).round().int().unique(dim=0).tolist()} == {tuple(colour) for colour in colours.tolist()}
    smooth = torch.cat([condition.flatten(1).T for condition in by_key(paired.prepare()).values()])
    assert len((smooth * 255).round().int().unique(dim=0)) > 100


def test_the_network_that_reads_latents_gets_the_condition_as_the_codec_encodes_it(paired: Paired) -> None:
    family = LatentFamily()
    for batch in epochs(paired.prepare(family, nearest=True)):
        for sample, cut, condition in zip(batch.samples, batch.geometry, batch.condition, strict=True):  # type: ignore[arg-type]
            pixels = images.crop(images.decode((paired.images / sample.key).read_bytes()), cut)
            assert torch.allclose(condition, family.codec.net(pixels.unsqueeze(0))[0], atol=2e-2)


@pytest.mark.parametrize("edge", [1, 100])
def test_a_packed_picture_comes_back_to_the_bit_in_one_of_few_lengths(edge: int) -> None:
    lengths = set()
    for seed in range(30):
        pixels = np.random.default_rng(seed).integers(0, 256, (edge, edge + seed, 3), dtype=np.uint8)
        kept = packed(Image.fromarray(pixels))
        lengths.add(len(kept))
        assert torch.equal((unpacked(kept) * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))
    assert len(lengths) <= 10


# -- who belongs to whom ------------------------------------------------------------------------------------------------------


def test_every_file_is_paired_or_left_out_with_a_reason(paired: Paired) -> None:
    picture(paired.images / "alone.png", 1, caption="alone")
    picture(paired.images / "bent.png", 1, (96, 64), caption="bent")
    picture(paired.conditions / "bent.png", 1, (64, 96))
    picture(paired.images / "broken.png", 1, caption="broken")
    (paired.conditions / "broken.png").write_bytes(b"no picture")
    picture(paired.conditions / "odd.png", 2)
    story = Story()
    data = paired.prepare(story=story)
    assert data.samples_per_epoch == 9
    report, conditions = paired.report["datasets"][0], paired.report["conditions"][0]
    assert {entry["key"]: entry["reason"] for entry in report["left_out"]} == {
        "alone.png": "no condition: no image of 'edges' has this name",
        "bent.png": "condition of another shape: it is 64x96, and the image 96x64",
        "broken.png": "condition unreadable: not a JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF image, or its header is damaged",
    }
    assert report["found"] == 12 == report["used"] + len(report["left_out"])
    assert conditions["found"] == 12 == conditions["used"] + len(conditions["left_out"])
    assert {"key": "odd.png", "reason": "condition without an image: no image has this name"} in conditions["left_out"]
    assert "conditions: edges: 12 files = 10 used + 2 left out (1 unreadable, 1 condition without an image)" in story.lines


def test_the_same_ending_comes_first_where_two_conditions_have_an_images_name(paired: Paired) -> None:
    picture(paired.conditions / "deep" / "0.png", 5, SIZES[0])
    chosen = by_key(paired.prepare())["deep/0.png"]
    expected = np.asarray(Image.open(paired.conditions / "deep" / "0.png").convert("RGB"))
    assert torch.equal((chosen * 255).round().byte(), torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_a_set_of_which_no_image_has_a_condition_is_refused(paired: Paired) -> None:
    for place in paired.conditions.rglob("*.bmp"):
        place.rename(place.with_name(f"edge_{place.name}"))
    with pytest.raises(DataError, match=r"all 9 files in .* are left out \(9 no condition\), such as .*no image of 'edges' has this name"):
        paired.prepare()


@pytest.mark.parametrize(
    ("image", "other"), [((640, 480), (320, 240)), ((641, 480), (320, 240)), ((512, 512), (513, 512)), ((9, 9), (900, 905))]
)
def test_a_picture_at_another_scale_has_the_same_shape(image: tuple[int, int], other: tuple[int, int]) -> None:
    assert same_shape(Size(*image), Size(*other))


@pytest.mark.parametrize(("image", "other"), [((640, 480), (480, 640)), ((512, 512), (516, 512)), ((1000, 500), (1000, 504))])
def test_a_picture_that_was_cut_has_another_shape(image: tuple[int, int], other: tuple[int, int]) -> None:
    assert not same_shape(Size(*image), Size(*other))


def test_one_image_under_two_names_has_a_condition_for_each(paired: Paired) -> None:
    for name, source in (("0", "0"), ("copy", "0")):
        grid(*SIZES[0]).save(paired.images / "deep" / f"{name}.png")
        (paired.images / "deep" / f"{name}.txt").write_text(source)
    grid(*SIZES[0]).transpose(Image.Transpose.ROTATE_180).save(paired.conditions / "deep" / "copy.png")
    found = by_key(paired.prepare(nearest=True))
    assert not torch.equal(found["deep/0.png"], found["deep/copy.png"])
    assert torch.equal(found["deep/copy.png"], found["deep/0.png"].flip(1, 2))


# -- changes ------------------------------------------------------------------------------------------------------------------


def test_a_changed_condition_alone_is_encoded_again_and_changes_the_fingerprint(paired: Paired) -> None:
    before = paired.prepare()
    fingerprint, conditions = before.fingerprint(), by_key(before)
    grid(*SIZES[0]).transpose(Image.Transpose.ROTATE_180).save(paired.conditions / "deep" / "0.bmp")
    story = Story()
    after = paired.prepare(story=story)
    assert any(line.startswith("latents: 9 needed, 8 cached; 1 encoded") and line.endswith("1 changed image") for line in story.lines)
    assert {name for name, value in after.fingerprint().items() if value != fingerprint[name]} == {"images"}
    changed = by_key(after)
    assert {key for key in changed if not torch.equal(changed[key], conditions[key])} == {"deep/0.png"}
    (paired.conditions / "deep" / "0.bmp").touch()
    touched = paired.prepare()
    assert touched.fingerprint(like=after.fingerprint()) == after.fingerprint()


def test_other_settings_of_the_conditions_change_the_fingerprint(paired: Paired) -> None:
    smooth, nearest = paired.prepare().fingerprint(), paired.prepare(nearest=True).fingerprint()
    assert {name for name, value in nearest.items() if value != smooth[name]} == {"conditions"}


def test_a_second_start_reads_nothing_and_gives_the_same_batches(paired: Paired) -> None:
    first = by_key(paired.prepare())
    codec, story = ConvCodec(), Story()
    again = by_key(paired.prepare(story=story))
    assert "latents: 9 needed, 9 cached" in story.lines and not codec.batches
    assert all(torch.equal(first[key], again[key]) for key in first | again)


def test_conditions_that_are_encoded_behind_training_are_the_same(paired: Paired) -> None:
    behind = by_key(paired.prepare(encode_while_training=True, crop=True, flip=True))
    cached = by_key(paired.prepare(crop=True, flip=True))
    assert behind.keys() == cached.keys() and all(torch.equal(behind[key], cached[key]) for key in cached)


def test_an_image_whose_condition_cannot_be_decoded_is_left_out_until_the_file_changes(paired: Paired) -> None:
    place = paired.conditions / "deep" / "0.bmp"
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    data = paired.prepare()
    assert len(by_key(data)) == 8 and data.samples_per_epoch == 9, "its place stays empty"
    [lost] = paired.report["datasets"][0]["left_out"]
    assert lost["key"] == "deep/0.png" and lost["reason"].startswith("condition unreadable: ")
    data.remember_undecodable()
    data.close()
    later = paired.prepare()
    assert later.samples_per_epoch == 8 and later.undecodable == {"toys": ["deep/0.png"]}
    place.write_bytes(whole)
    assert paired.prepare().samples_per_epoch == 9


def test_a_damaged_record_is_made_again_with_its_condition(paired: Paired, caplog: pytest.LogCaptureFixture) -> None:
    conditions = by_key(paired.prepare())
    damage(paired.root / "output", "latents")
    again = by_key(paired.prepare())
    assert "it is encoded again" in caplog.text
    assert all(torch.equal(again[key], conditions[key]) for key in again | conditions)


def test_a_micro_batch_of_which_nothing_can_be_had_stands_in_with_a_condition(paired: Paired) -> None:
    for place in (paired.conditions / "deep").glob("[036].bmp"):
        place.write_bytes(place.read_bytes()[:-100])
    blank = [batch for batch in epochs(paired.prepare()) if batch.stands_in]
    assert blank and all(batch.condition is not None and batch.condition.shape == (1, 3, 64, 96) for batch in blank)


def test_a_set_without_conditions_is_as_it_was(paired: Paired) -> None:
    assert all(batch.condition is not None for batch in epochs(paired.prepare()))
    cache = paired.root / "output" / "cache"
    plain: DatasetConfig = dataset(paired.images, cache)
    data = prepare_data([plain], settings(paired.root / "output"), PixelFamily(), Workers(), Story())  # type: ignore[arg-type]
    assert all(batch.condition is None for batch in epochs(data)) and "conditions" not in data.fingerprint()


class SlowSource(LocalSource):
    """A folder that answers as a network does, and counts how many conditions it is asked for at the same time."""

    reads_at_once = 8

    def __init__(self, root: Path, counts: Counter[str], lock: Lock) -> None:
        super().__init__(root)
        self.counts, self.lock = counts, lock

    def read(self, key: str) -> bytes:
        if not key.endswith(".bmp"):
            return super().read(key)
        with self.lock:
            self.counts["now"] += 1
            self.counts["most"] = max(self.counts["most"], self.counts["now"])
        sleep(0.05)
        try:
            return super().read(key)
        finally:
            with self.lock:
                self.counts["now"] -= 1


def test_conditions_of_a_remote_set_are_read_ahead_also_past_an_image_that_vanished(
    paired: Paired, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_key(paired.prepare())
    shutil.rmtree(paired.root / "output")
    counts, lock = Counter[str](), Lock()
    monkeypatch.setattr(scanning, "open_source", lambda entry: SlowSource(entry.instance_data_dir, counts, lock))
    scan = scanning.Scanner.run

    def then_lose_one(scanner: scanning.Scanner) -> Any:
        scanned = scan(scanner)
        (paired.images / "deep" / "4.png").unlink()
        return scanned

    monkeypatch.setattr(scanning.Scanner, "run", then_lose_one)
    found = by_key(paired.prepare())
    assert counts["most"] > 4  # two threads alone would ask for two
    assert found.keys() == expected.keys() - {"deep/4.png"}
    assert all(torch.equal(found[key], expected[key]) for key in found)
