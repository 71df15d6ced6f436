"""Captions and sizes on their way to batches: all encoded beforehand, drawn by address, and never a cut by a wrong size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.config.datasets import TableConfig
from helpers.data.base.workers import Workers
from helpers.data.prepare import prepare_data
from helpers.data.training_data import TrainingData
from tests.data.test_tables import parquet
from tests.data.toys import HashEncoders, Story, ToyFamily, WordLengths, dataset, picture, settings

SIZES = [(96, 64), (64, 96)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures with two captions each."""
    for index in range(4):
        picture(tmp_path / "data" / f"{index}.png", index, SIZES[index % 2], f"ugly, red {index}, blue, green\nsecond of {index}")
    return tmp_path / "data"


def prepared(data: Path, family: ToyFamily | None = None, story: Story | None = None, seed: int = 7, **changed: Any) -> TrainingData:
    output = data.parent / "output"
    sets = [dataset(data, output / "cache", **changed)]
    return prepare_data(sets, settings(output, seed=seed), family or ToyFamily(), Workers(), story or Story())  # type: ignore[arg-type]


def drawn(data: TrainingData, epochs: int) -> list[tuple[int, str, str]]:
    """(epoch, key, caption) of every sample, whose text is the caption's."""
    batches = [batch for step in data.steps(0, epochs * data.micro_batches_per_epoch) for batch in step]
    for batch in batches[:10]:
        assert torch.equal(batch.text["states"], HashEncoders().encode(batch.captions)["states"])
    return [(batch.epoch, sample.key, caption) for batch in batches for sample, caption in zip(batch.samples, batch.captions, strict=True)]


def test_every_caption_of_a_picture_is_encoded_once_and_drawn_equally_often(pictures: Path) -> None:
    family = ToyFamily()
    data = prepared(pictures, family, multiple_captions=True)
    assert len(family.encoders.encoded) == len(set(family.encoders.encoded)) == 9  # two for each of four, and the empty one
    seen = drawn(data, epochs=100)
    counts = Counter((key, caption) for _, key, caption in seen)
    assert len(counts) == 8 and all(30 <= count <= 70 for count in counts.values()), counts
    assert seen == drawn(prepared(pictures, multiple_captions=True), epochs=100)
    assert seen != drawn(prepared(pictures, multiple_captions=True, seed=8), epochs=100)


def test_a_first_start_tells_of_caption_files_that_are_not_read(pictures: Path) -> None:
    told = "captions: toys: captions are file names, and 4 .txt files are not read; caption_strategy textfile reads them"
    (pictures / "0.png").rename(pictures / "4.png")  # then 0.txt stands alone, which the report names
    (pictures / "4.txt").write_text("read by nobody")
    first, second, by_text = Story(), Story(), Story()
    prepared(pictures, story=first, caption_strategy="filename")
    (pictures.parent / "output" / "dataset_report.html").touch()  # a reporter's work
    prepared(pictures, story=second, caption_strategy="filename")
    prepared(pictures, story=by_text, caption_strategy="textfile")
    assert told in first.lines
    assert not any("not read" in line for line in second.lines + by_text.lines)


def test_orders_of_tags_are_encoded_beforehand_and_a_second_start_encodes_nothing(pictures: Path) -> None:
    changed: dict[str, Any] = {"multiple_captions": True, "shuffle_tags": True, "keep_tags": 1}
    first, second = ToyFamily(), ToyFamily()
    seen = drawn(prepared(pictures, first, **changed), epochs=30)
    assert len(first.encoders.encoded) == len(set(first.encoders.encoded))
    assert {caption for _, _, caption in seen} <= set(first.encoders.encoded)
    assert len({caption for _, key, caption in seen if key == "0.png"}) > 3, "one of them is the second caption"
    assert {caption.split(", ")[0] for _, _, caption in seen if "," in caption} == {"ugly"}
    assert drawn(prepared(pictures, second, **changed), epochs=30) == seen
    assert not second.encoders.encoded


def test_an_edited_filter_list_encodes_again_just_the_captions_it_changes(pictures: Path) -> None:
    (pictures / "3.txt").write_text("pretty\nsecond of 3")
    prepared(pictures, multiple_captions=True)
    story = Story()
    seen = drawn(prepared(pictures, story=story, multiple_captions=True, caption_filters=("ugly, ",)), epochs=20)
    assert any(line.startswith("text: 9 needed, 6 cached; 3 encoded") for line in story.lines), story.lines
    assert not any("ugly" in caption for _, _, caption in seen)


@pytest.mark.parametrize(
    ("key", "value"), [("multiple_captions", True), ("shuffle_tags", True), ("caption_filters", ("ugly, ",)), ("instance_prompt", "x")]
)
def test_the_fingerprint_covers_every_caption_and_not_only_the_first(pictures: Path, key: str, value: Any) -> None:
    changed = {"multiple_captions": True, "prepend_instance_prompt": True, "instance_prompt": "sks"}
    before = prepared(pictures, **changed).fingerprint()
    assert prepared(pictures, **changed).fingerprint() == before
    if key != "multiple_captions":
        after = prepared(pictures, **{**changed, key: value}).fingerprint()
    else:
        text = (pictures / "0.txt").read_text()
        (pictures / "0.txt").write_text(text.replace("second", "another"))
        after = prepared(pictures, **changed).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"captions"}


# -- sizes from a table -----------------------------------------------------------------------------------------------------


def table(data: Path, **sizes: tuple[int, int]) -> dict[str, Any]:
    """Keys of a dataset whose sizes come from a table, which is right but for what `sizes` says."""
    right = {str(index): SIZES[index % 2] for index in range(4)}
    rows = [{"id": name, "width": width, "height": height} for name, (width, height) in (right | sizes).items()]
    (data / "sizes.parquet").write_bytes(parquet(rows))
    return {"metadata_backend": "parquet", "parquet": TableConfig("sizes.parquet", "id", caption_column="description")}


def report(data: Path) -> dict[str, Any]:
    return json.loads((data.parent / "output" / "dataset_report.json").read_text())["datasets"][0]


def test_sizes_from_a_table_give_the_same_plan_and_latents_as_those_of_the_pictures(pictures: Path) -> None:
    family = ToyFamily()
    fingerprint = prepared(pictures).fingerprint()
    assert prepared(pictures, family, **table(pictures)).fingerprint() == fingerprint
    assert not family.codec.batches
    counts = {"compared": 4, "swapped": 0}
    assert report(pictures)["tables"] == [{"path": "sizes.parquet", "rows": 4, "unnamed": 0, "without_image": 0, "example": ""} | counts]


@pytest.mark.parametrize("wrong", [(128, 192), (65, 96)], ids=["twice as large", "one pixel off"])
def test_a_picture_of_another_size_than_its_table_says_is_left_out_and_never_cut_wrongly(pictures: Path, wrong: tuple[int, int]) -> None:
    Image.open(pictures / "1.png").save(pictures / "1.jpg")  # a JPEG may be decoded at half its size
    (pictures / "1.png").unlink()
    keys = table(pictures, **{"1": wrong})
    seen = drawn(prepared(pictures, **keys), epochs=1)
    assert {key for _, key, _ in seen} == {"0.png", "2.png", "3.png"}
    said = f"wrong size: the image is 64x96 and not {wrong[0]}x{wrong[1]}, as the scan or a table said"
    assert report(pictures)["left_out"] == [{"key": "1.jpg", "reason": said}]
    for _ in range(2):  # and so it stays, until the table is put right
        prepared(pictures, **keys)
        assert (report(pictures)["found"], report(pictures)["used"]) == (4, 3)
    assert len(drawn(prepared(pictures, **table(pictures)), epochs=1)) == 4


def test_the_size_in_a_table_is_that_of_the_picture_as_shown(pictures: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: 96x64 in the file, 64x96 as shown
    Image.open(pictures / "0.png").save(pictures / "0.jpg", exif=exif)
    (pictures / "0.png").unlink()
    data = prepared(pictures, **table(pictures, **{"0": (64, 96)}))
    assert len(drawn(data, epochs=1)) == 4


def test_live_text_tells_how_many_captions_are_cut_off_at_every_start_and_measures_them_once(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        (pictures / f"{index}.txt").write_text("longer than what is read, " * 5 + str(index % 2))  # two captions, of 26 words
    output = pictures.parent / "output"

    def told() -> list[str]:
        story, entry = Story(), dataset(pictures, output / "cache")
        prepare_data([entry], settings(output, live_text=True), ToyFamily(), Workers(), story)  # type: ignore[arg-type]
        return [line for line in story.lines if "longer than the text encoders read" in line]

    assert told() == [": 2 captions are longer than the text encoders read, and are cut off"]
    again = told()
    monkeypatch.setattr(WordLengths, "token_counts", lambda self, captions: pytest.fail("measured again"))
    assert told() == again == [": 2 captions are longer than the text encoders read, and are cut off"]
