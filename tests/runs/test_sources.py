"""Whole runs on what is no folder of images: stopped in the middle, gone on with, and the source as it was."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.data.toys import tree_hash
from tests.harness import Trainer

pytestmark = pytest.mark.slow


def tars(images: Path, folder: Path) -> Mapping[str, Any]:
    """As img2dataset writes them: picture, caption and facts of a sample in a row."""
    folder.mkdir()
    paths = sorted(images.iterdir())
    for number in range(2):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for row, path in enumerate(paths[number::2]):
                caption = f"row {row} of {number}"
                facts = json.dumps({"caption": caption, "width": 64}).encode()
                for ending, data in (("png", path.read_bytes()), ("txt", caption.encode()), ("json", facts)):
                    member = tarfile.TarInfo(f"{row:09}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return {"type": "webdataset", "urls": str(folder / "{00000..00001}.tar")}


def parquet(images: Path, folder: Path) -> Mapping[str, Any]:
    import datasets

    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "text": f"row {n} of 0"}
        for n, path in enumerate(sorted(images.iterdir()))
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return {"type": "huggingface", "path": str(folder)}


@pytest.mark.parametrize("write", [tars, parquet])
def test_a_run_on_tars_and_on_rows_is_stopped_and_goes_on(
    write: Callable[[Path, Path], Mapping[str, Any]], trainer: Trainer, images: Path
) -> None:
    entry = write(images, trainer.folder / "source")
    before = tree_hash(trainer.folder / "source")
    trainer.dataloader(instance_data_dir=None, caption_strategy=None, **entry)
    trainer.finish(validation_prompt=None, max_train_steps=2)
    ended = trainer.finish(validation_prompt=None, max_train_steps=4)
    assert tree_hash(trainer.folder / "source") == before
    [told] = json.loads((ended.folder / "dataset_report.json").read_text())["datasets"]
    assert (told["found"], told["used"], told["left_out"]) == (14, 14, [])
    samples = ended.rows("samples.jsonl")
    assert {row["step"] for row in samples} == {1, 2, 3, 4}
    assert {row["caption"] for row in samples} - {""} <= {f"row {n} of {k}" for n in range(14) for k in range(2)}


def test_a_data_set_that_is_not_there_ends_the_run_with_a_sentence(trainer: Trainer) -> None:
    trainer.dataloader(type="huggingface", path="someone/images", instance_data_dir=None, caption_strategy=None)
    ended = trainer.run()
    assert ended.code == 2 and "Traceback" not in ended.printed
    assert "download it first: hf download someone/images --repo-type dataset" in " ".join(ended.printed.split())
