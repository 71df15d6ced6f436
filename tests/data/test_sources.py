"""Every kind of source is scanned, encoded, reported and cached alike."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import DatasetConfig
from helpers.config.options import OPTIONS
from helpers.data.base.workers import Workers
from helpers.data.prepare import prepare_data
from helpers.data.training_data import TrainingData
from helpers.errors import DataError
from tests.data.toys import Story, ToyFamily, dataset, picture, pictures, settings, tree_hash

Write = Callable[[Path, Path], Mapping[str, Any]]


def as_tars(folder: Path, target: Path) -> Mapping[str, Any]:
    """A tar for every two samples."""
    target.mkdir()
    stems = sorted({path.stem for path in folder.iterdir()})
    for number in range(0, len(stems), 2):
        with tarfile.open(target / f"{number // 2:05}.tar", "w") as tar:
            for path in sorted(path for path in folder.iterdir() if path.stem in stems[number : number + 2]):
                tar.add(path, path.name)
    return {"type": "webdataset", "urls": f"{target}/{{00000..{(len(stems) - 1) // 2:05}}}.tar"}


def as_rows(folder: Path, target: Path) -> Mapping[str, Any]:
    import datasets

    paths = sorted(folder.glob("*.png"))
    captions = [path.with_suffix(".txt").read_text() if path.with_suffix(".txt").exists() else None for path in paths]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "text": captions}, features=features)
    rows.save_to_disk(target)
    return {"type": "huggingface", "path": str(target)}


def configured(entry: Mapping[str, Any], caches: Path) -> DatasetConfig:
    """The toys' settings with the place of an entry of the dataloader JSON."""
    file = caches / "data.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([{"id": "toys", **entry}]))
    data = read_dataloader(file, {name: item.default for name, item in OPTIONS.items()})
    assert data.problems == ()
    [found] = data.datasets
    place = {name: getattr(found, name) for name in ("type", "path", "urls", "shards", "caption_strategy", "instance_data_dir")}
    return dataset(None, caches, **place)  # type: ignore[arg-type]


def prepared(entry: Mapping[str, Any], output: Path, story: Story | None = None) -> TrainingData:
    return prepare_data(
        [configured(entry, output / "cache")],
        settings(output),
        ToyFamily(),  # type: ignore[arg-type]  # as much of a family as data needs
        Workers(),
        story or Story(),
    )


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "dataset_report.json").read_text())["datasets"][0]


@pytest.fixture(params=[as_tars, as_rows])
def write(request: pytest.FixtureRequest) -> Write:
    return request.param


def test_the_same_pictures_give_the_same_batches_whatever_holds_them(write: Write, tmp_path: Path) -> None:
    """The same order of keys, so the same order of samples; and the source is as it was."""
    folder = pictures(tmp_path / "data")
    entry = write(folder, tmp_path / "other")
    before = tree_hash(tmp_path / "other")
    there = prepared(entry, tmp_path / "there")
    assert tree_hash(tmp_path / "other") == before
    here = prepared({"instance_data_dir": str(folder), "caption_strategy": "textfile"}, tmp_path / "here")
    names = ("buckets", "found", "used", "left_out")
    assert [report(tmp_path / "there")[name] for name in names] == [report(tmp_path / "here")[name] for name in names]
    captions = [[batch.captions for step in data.steps(0, 10) for batch in step] for data in (there, here)]
    assert captions[0] == captions[1] and len({caption for batch in captions[0] for caption in batch}) == 10


def test_a_second_start_reads_no_picture_and_encodes_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write(pictures(tmp_path / "data"), tmp_path / "other")
    first = prepared(entry, tmp_path / "out")
    for name in ("webdataset.WebDataset.open", "webdataset.WebDataset.read", "huggingface.HuggingFaceSource.read"):
        monkeypatch.setattr(f"helpers.storage.{name}", None)
    story = Story()
    second = prepared(entry, tmp_path / "out", story)
    assert "latents: 10 needed, 10 cached" in story.lines and "text: 11 needed, 11 cached" in story.lines
    assert second.fingerprint() == first.fingerprint()


def test_only_the_picture_that_changed_is_encoded_anew(write: Write, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data")
    prepared(write(folder, tmp_path / "other"), tmp_path / "out")
    picture(folder / "picture_03.png", 99)
    shutil.rmtree(tmp_path / "other")
    story = Story()
    prepared(write(folder, tmp_path / "other"), tmp_path / "out", story)
    assert any(line.startswith("latents: 10 needed, 9 cached") for line in story.lines), story.lines


def test_what_cannot_be_used_is_left_out_and_named(write: Write, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data")
    (folder / "picture_02.png").write_bytes(b"<html>")
    (folder / "picture_05.txt").unlink()
    prepared(write(folder, tmp_path / "other"), tmp_path / "out")
    told = report(tmp_path / "out")
    assert (told["found"], told["used"]) == (10, 8)
    assert [entry["reason"].partition(":")[0] for entry in told["left_out"]] == ["unreadable", "no caption"]


def test_a_tar_that_is_cut_off_is_told_in_the_report(tmp_path: Path) -> None:
    entry = as_tars(pictures(tmp_path / "data"), tmp_path / "tars")
    path = tmp_path / "tars" / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    prepared(entry, tmp_path / "out")
    told = report(tmp_path / "out")
    assert told["found"] == told["used"] + len(told["left_out"])
    reasons = {left["key"]: left["reason"] for left in told["left_out"]}
    assert reasons["00001.tar"].startswith("damaged tar: ")
    assert any(reason.startswith("cut off") for reason in reasons.values())


def test_a_source_without_pictures_is_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match="there are no files in .*empty.tar; put images there, or correct the path"):
        prepared({"type": "webdataset", "urls": str(tmp_path / "empty.tar")}, tmp_path / "out")
