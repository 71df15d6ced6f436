"""Loss masks: paired by name or taken from alpha channels, cropped to the pixel as the images are, left out where they teach nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from helpers.config.datasets import DatasetConfig
from helpers.data.base.images import ImageError, decode_alpha, decode_mask
from helpers.data.base.workers import Workers
from helpers.data.batches import Batch
from helpers.data.prepare import prepare_data
from helpers.data.report.survey import Survey
from helpers.data.training_data import TrainingData
from helpers.errors import DataError
from tests.data.test_conditions import SIZES, PixelFamily, epochs, grid
from tests.data.toys import Story, ToyFamily, dataset, picture, settings

Levels = NDArray[np.uint8]
UPRIGHT = {"caption_strategy": "instanceprompt", "instance_prompt": "none"}


def levels(index: int, low: int = 0, high: int = 256) -> Levels:
    """The mask of image number `index`: noise, with a black column and a black row."""
    width, height = SIZES[index % 3]
    found = np.random.default_rng(index).integers(low, high, (height, width)).astype(np.uint8)
    found[:, 5], found[7] = 0, 0
    return found


@dataclass
class Masked:
    """A folder of images with captions, a folder of masks, and how to prepare them."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def masks(self) -> Path:
        return self.root / "masks"

    def entry(self, **changed: Any) -> DatasetConfig:
        """The images with their masks, unless `changed` says otherwise."""
        cache = self.root / "output" / "cache"
        masks = dataset(self.masks, cache, id="masks", dataset_type="mask", **UPRIGHT)
        return dataset(self.images, cache, **{"mask_data": "masks", "mask": masks, **changed})

    def prepare(
        self, *more: DatasetConfig, family: ToyFamily | None = None, story: Story | None = None, behind: bool = False, **changed: Any
    ) -> TrainingData:
        return prepare_data(
            [self.entry(**changed), *more],
            settings(self.root / "output", encode_while_training=behind),
            family or PixelFamily(),  # type: ignore[arg-type]  # as much of a family as data needs
            Workers(),
            story or Story(),
        )

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "output" / "dataset_report.json").read_text())


@pytest.fixture
def masked(tmp_path: Path) -> Masked:
    """Six coordinate grids. Their masks are three times as large; one is stored rotated, as EXIF says."""
    masked = Masked(tmp_path)
    for folder in (masked.images, masked.masks):
        folder.mkdir()
    for index in range(6):
        grid(*SIZES[index % 3]).save(masked.images / f"{index}.png")
        (masked.images / f"{index}.txt").write_text(f"caption number {index}")
        large = Image.fromarray(levels(index).repeat(3, 0).repeat(3, 1))
        exif = Image.Exif()
        if index == 1:
            large, exif[0x0112] = large.transpose(Image.Transpose.ROTATE_90), 6
        large.save(masked.masks / f"{index}.png", exif=exif)
    return masked


def by_key(data: TrainingData) -> dict[str, tuple[Batch, int]]:
    return {sample.key: (batch, place) for batch in epochs(data) for place, sample in enumerate(batch.samples)}


def weights(found: tuple[Batch, int]) -> NDArray[np.float32]:
    """The mask of one sample, (h, w)."""
    batch, place = found
    assert batch.mask is not None
    return batch.mask[place, 0].numpy()


# -- the cut ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redrawn", [False, True])
def test_a_mask_is_cropped_and_mirrored_with_its_image_to_the_pixel(redrawn: bool, masked: Masked) -> None:
    data = masked.prepare(crop=True, crop_style="random", flip=True, vae_cache_clear_each_epoch=redrawn, behind=redrawn)
    flips = set()
    for batch in epochs(data, 3):
        assert batch.mask is not None and batch.mask.dtype == torch.float32 and batch.mask.shape == batch.latents[:, :1].shape
        columns, rows, _ = ((batch.latents + 1) * 127.5).round().int().numpy().transpose(1, 0, 2, 3)
        for place, sample in enumerate(batch.samples):
            expected = levels(int(Path(sample.key).stem))[rows[place], columns[place]] / np.float32(255)
            assert np.allclose(batch.mask[place, 0].numpy(), expected, atol=1e-6)
        flips |= {geometry.flip for geometry in batch.geometry}
    assert len(flips) == 2
    data.close()


def test_a_latent_pixel_has_the_mean_of_its_pixels_and_black_has_the_outside_weight(masked: Masked) -> None:
    found = by_key(masked.prepare(family=ToyFamily(), mask_outside_weight=0.25))
    for key, sample in found.items():
        mask = levels(int(Path(key).stem)).astype(np.float64) / 255
        height, width = mask.shape
        means = mask.reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3))
        assert np.allclose(weights(sample), 0.25 + 0.75 * means, atol=1e-5)
    assert len(found) == 6


def test_black_stays_0_to_the_edge_where_a_mask_is_resized(masked: Masked) -> None:
    for index in range(6):
        width, height = SIZES[index % 3]
        half = np.zeros((height // 2, width // 2), np.uint8)
        half[:, : width // 4] = 255
        Image.fromarray(half).save(masked.masks / f"{index}.png")
    for sample in by_key(masked.prepare()).values():
        mask = weights(sample)
        assert set(np.unique(mask)) == {0, 1} and mask.mean() == 0.5


# -- what a mask may be -------------------------------------------------------------------------------------------------------

LEVELS = levels(0) // 128 * 255
ONE = Image.fromarray(LEVELS)


def with_alpha(color: Image.Image, alpha: Levels) -> Image.Image:
    color.putalpha(Image.fromarray(alpha))
    return color


WAYS: dict[str, Callable[[], Image.Image]] = {
    "gray": lambda: ONE,
    "1-bit": lambda: ONE.convert("1"),
    "16-bit": lambda: Image.fromarray(LEVELS.astype(np.uint16) * 257),
    "color": lambda: ONE.convert("RGB"),
    "palette": lambda: ONE.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=2),
    "opaque": lambda: ONE.convert("RGBA"),
    "white on nothing": lambda: with_alpha(Image.new("RGB", ONE.size, "white"), LEVELS),
    "gray with alpha": lambda: with_alpha(Image.new("L", ONE.size, 255), LEVELS),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_may_be_stored_in_any_way(way: str, tmp_path: Path) -> None:
    WAYS[way]().save(tmp_path / "mask.png")
    mask = decode_mask((tmp_path / "mask.png").read_bytes())
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), LEVELS)


def test_32_bit_masks_have_no_white(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(ImageError, match="unsupported: 32-bit"):
        decode_mask((tmp_path / "mask.tif").read_bytes())


def test_an_alpha_channel_is_there_or_not(tmp_path: Path) -> None:
    for name, image in (("alpha", WAYS["white on nothing"]()), ("none", ONE.convert("RGB"))):
        image.save(tmp_path / f"{name}.webp", lossless=True)
    found = decode_alpha((tmp_path / "alpha.webp").read_bytes())
    assert found is not None and np.array_equal(np.asarray(found), LEVELS)
    assert decode_alpha((tmp_path / "none.webp").read_bytes()) is None


# -- who belongs to whom, and what is left out --------------------------------------------------------------------------------


def test_every_file_is_paired_or_left_out_with_a_reason_and_the_report_has_the_coverage(masked: Masked) -> None:
    for name in ("alone", "bent", "broken", "dark"):
        picture(masked.images / f"{name}.png", 1, caption=name)
    picture(masked.masks / "bent.png", 1, (64, 96))
    picture(masked.masks / "odd.png", 2)
    whole = picture(masked.masks / "broken.png", 1).read_bytes()
    (masked.masks / "broken.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (96, 64)).save(masked.masks / "dark.png")
    Image.new("L", SIZES[0], 255).save(masked.masks / "0.png")
    Image.fromarray(np.arange(96 * 64, dtype=np.uint8).reshape(64, 96) % 2).save(masked.masks / "3.png")
    story = Story()
    assert masked.prepare(story=story).samples_per_epoch == 6
    [images], [masks] = masked.report["datasets"], masked.report["masks"]
    reasons = {entry["key"]: entry["reason"] for entry in images["left_out"]}
    assert reasons.pop("broken.png").startswith("mask unreadable: ")
    assert reasons == {
        "alone.png": "no mask: no image of 'masks' has this name",
        "bent.png": "mask of another shape: it is 64x96, and the image 96x64",
        "dark.png": "black mask: it has no white, so there is nothing to train",
    }
    assert images["found"] == 10 == images["used"] + len(images["left_out"])
    assert {"key": "odd.png", "reason": "mask without an image: no image has this name"} in masks["left_out"]
    means = [1.0, *(levels(index).mean() / 255 for index in (1, 2)), 0.5 / 255, *(levels(index).mean() / 255 for index in (4, 5))]
    assert images["mask"]["coverage"] == pytest.approx(np.mean(means), abs=1e-4)
    assert images["mask"]["coverages"]["counts"] == np.histogram(means, np.linspace(0, 1, 11))[0].tolist()
    found = {name: images["mask"][name] for name in ("data", "whole", "without_alpha", "dim", "dim_example")}
    assert found == {"data": "masks", "whole": 1, "without_alpha": 0, "dim": 1, "dim_example": "3.png"}
    [line] = [line for line in story.lines if line.startswith("masks: toys: ")]
    assert f"6 masks, {100 * np.mean(means):.1f} % white on average · 1 of 6 are white all over · 1 of 6 are darker than half" in line
    assert "such as 3.png; white is 255; what is black has the loss weight 0" in line


def test_a_set_of_which_no_image_has_a_mask_is_refused(masked: Masked) -> None:
    for place in masked.masks.iterdir():
        place.rename(place.with_name(f"{place.stem}_mask.png"))
    with pytest.raises(
        DataError, match=r"all 6 files in .* are left out \(6 no mask\), such as .*no image of 'masks' has this name, but 0_mask.png"
    ):
        masked.prepare()
    for place in masked.masks.iterdir():
        place.unlink()
    with pytest.raises(DataError, match="no image of 'masks' has this name, and no image at all"):
        masked.prepare()


def test_alpha_channels_are_masks_and_an_image_without_one_is_trained_whole(masked: Masked) -> None:
    for index in range(5):
        with_alpha(grid(*SIZES[index % 3]), levels(index)).save(masked.images / f"{index}.png")
    with_alpha(grid(96, 64), np.zeros((64, 96), np.uint8)).save(masked.images / "clear.png")
    (masked.images / "clear.txt").write_text("nothing")
    story = Story()
    found = by_key(masked.prepare(story=story, mask_data="alpha", mask=None))
    assert len(found) == 6 and (weights(found["5.png"]) == 1).all()
    assert all(np.allclose(weights(found[f"{index}.png"]), levels(index) / 255, atol=1e-6) for index in range(5))
    [left_out] = masked.report["datasets"][0]["left_out"]
    assert left_out["reason"] == "black mask: the alpha channel is transparent everywhere, so there is nothing to train"
    assert any("1 of 6 images have no alpha channel and are trained whole" in line for line in story.lines)
    again = Story()
    assert by_key(masked.prepare(story=again, mask_data="alpha", mask=None)).keys() == found.keys()
    assert "latents: 6 needed, 6 cached" in again.lines
    with_alpha(grid(96, 64), levels(0)).save(masked.images / "clear.png")
    assert masked.prepare(mask_data="alpha", mask=None).samples_per_epoch == 7


def test_an_image_whose_crop_shows_nothing_of_the_white_is_left_out_of_the_epochs_where_that_is_so(masked: Masked) -> None:
    """Its place stays empty. With fixed crops that is every epoch; the next run with another crop has it again."""
    left = np.zeros((64, 96), np.uint8)
    left[:, :20] = 255
    Image.fromarray(left).save(masked.masks / "0.png")
    cropped = {"crop": True, "crop_style": "corner"}
    data = masked.prepare(**cropped)
    assert "0.png" not in by_key(data) and data.samples_per_epoch == 6
    [lost] = masked.report["datasets"][0]["left_out"]
    assert lost == {"key": "0.png", "reason": "mask outside the crop: 64x64 at 32, 0 shows nothing of its white"}
    data.remember_undecodable()
    data.close()
    assert "0.png" in by_key(masked.prepare())
    redrawn = masked.prepare(crop=True, crop_style="random", vae_cache_clear_each_epoch=True)
    cuts = [cut for batch in epochs(redrawn, 12) for cut in zip(batch.samples, batch.geometry, strict=True)]
    trained = [geometry.left for sample, geometry in cuts if sample.key == "0.png"]
    assert 0 < len(trained) < 12 and all(start < 20 for start in trained)
    redrawn.close()


def test_a_micro_batch_of_which_nothing_can_be_had_has_a_mask_that_divides_nothing_by_0(masked: Masked) -> None:
    for index in (0, 3):
        whole = (masked.images / f"{index}.png").read_bytes()
        (masked.images / f"{index}.png").write_bytes(whole[: len(whole) // 2])
    blank = [batch for batch in epochs(masked.prepare()) if batch.stands_in]
    assert blank and all(batch.mask is not None and bool((batch.mask == 1).all()) for batch in blank)


def test_the_report_page_darkens_what_a_mask_leaves_black(masked: Masked) -> None:
    for index in range(6):
        width, height = SIZES[index % 3]
        Image.new("RGB", (width, height), (0, 200, 0)).save(masked.images / f"{index}.png")
        half = np.zeros((height, width), np.uint8)
        half[:, : width // 2] = 255
        Image.fromarray(half).save(masked.masks / f"{index}.png")
    surveyed: list[Survey] = []

    class Reader(Story):
        def surveyed(self, survey: Survey) -> None:
            surveyed.append(survey)

    masked.prepare(story=Reader())
    shown = [np.asarray(Image.open(io.BytesIO(each.jpeg)))[..., 1].astype(int) for each in surveyed[0].thumbnails()]
    for green in shown:
        middle = green.shape[1] // 2
        assert abs(green[:, : middle - 8] - 200).max() < 10 and abs(green[:, middle + 8 :] - 50).max() < 10
    assert len(shown) == 6


# -- beside other things ------------------------------------------------------------------------------------------------------


def test_masks_conditions_and_sets_without_masks_go_together(masked: Masked) -> None:
    cache = masked.root / "output" / "cache"
    edges = dataset(masked.images, cache, id="edges", dataset_type="conditioning", **UPRIGHT)
    for index in range(4):
        picture(masked.root / "plain" / f"{index}.png", index, caption="plain")
    plain = dataset(masked.root / "plain", cache, id="plain", condition=dataset(masked.root / "plain", cache, id="own", **UPRIGHT))
    data = masked.prepare(plain, condition=edges)
    kinds = set()
    for batch in epochs(data):
        assert batch.condition is not None
        assert torch.allclose((batch.latents + 1) / 2, batch.condition, atol=1e-5)
        kinds.add((batch.samples[0].dataset, batch.mask is not None))
    assert kinds == {("toys", True), ("plain", False)}
    fingerprint = data.fingerprint()
    assert fingerprint["conditions"] == "toys pixels lanczos v1, plain pixels lanczos v1"
    assert fingerprint["masks"] == "toys brightness 1/1 v1 outside 0"


def test_a_changed_mask_is_encoded_again_and_changes_the_fingerprint_and_so_do_other_settings(masked: Masked) -> None:
    before = masked.prepare()
    fingerprint, found = before.fingerprint(), by_key(before)
    Image.fromarray(255 - levels(0)).save(masked.masks / "0.png")
    story = Story()
    after = masked.prepare(story=story)
    assert any(line.startswith("latents: 6 needed, 5 cached; 1 encoded") for line in story.lines)
    assert {name for name, value in after.fingerprint().items() if value != fingerprint[name]} == {"images"}
    changed = by_key(after)
    assert {key for key in found if not np.array_equal(weights(found[key]), weights(changed[key]))} == {"0.png"}
    again = Story()
    other = masked.prepare(story=again, mask_outside_weight=0.5)
    assert "latents: 6 needed, 6 cached" in again.lines
    assert {name for name, value in other.fingerprint().items() if value != after.fingerprint()[name]} == {"masks"}
    without = masked.prepare(mask_data=None, mask=None)
    assert all(batch.mask is None for batch in epochs(without)) and "masks" not in without.fingerprint()
