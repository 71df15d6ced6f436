from __future__ import annotations

import io
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.errors import DataError
from helpers.storage.huggingface import HuggingFaceSource

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def caches_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries read these when they are imported, which an earlier test may have done; and no network, whatever they try."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*arguments: object) -> None:
        raise AssertionError("something connects to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [png(number) for number in range(5)]
CAPTIONS = [f"caption {number}" for number in range(5)]


def rows(captions: Any = CAPTIONS, pictures: Any = PICTURES, name: str = "text", kind: Any = None) -> Any:
    features = datasets.Features({"image": datasets.Image(), name: kind or datasets.Value("string")})
    cells = [{"bytes": picture, "path": None} if isinstance(picture, bytes) else picture for picture in pictures]
    return datasets.Dataset.from_dict({"image": cells, name: list(captions)}, features=features)


def files(source: HuggingFaceSource) -> dict[str, bytes]:
    found = {entry.key: source.read(entry.key) for entry in source.list()}
    assert {entry.key: entry.size for entry in source.list()} == {key: len(data) for key, data in found.items()}
    return found


EXPECTED = {f"{row:07}.{ending}": data for row in range(5) for ending, data in (("jpg", PICTURES[row]), ("txt", CAPTIONS[row].encode()))}


def saved(folder: Path) -> Path:
    rows().save_to_disk(folder)
    return folder


def saved_splits(folder: Path) -> Path:
    datasets.DatasetDict({"test": rows().select([0]), "train": rows()}).save_to_disk(folder)
    return folder


def parquet(folder: Path) -> Path:
    """As a dataset lies on the hub: numbered files of two splits, and a page."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# a dataset")
    rows().select(range(3)).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    rows().select(range(3, 5)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    rows().select([0]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def one_file(folder: Path) -> Path:
    folder.mkdir()
    rows().to_parquet(folder / "mine.parquet")
    return folder / "mine.parquet"


def arrow(folder: Path) -> Path:
    shutil.copytree(saved(folder.with_name("before")), folder)
    (folder / "state.json").unlink()
    return folder


def without_features(folder: Path) -> Path:
    """A table that the library has not written."""
    folder.mkdir()
    pq.write_table(pa.table({"image": PICTURES, "text": CAPTIONS}), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("write", [saved, saved_splits, parquet, one_file, arrow, without_features])
def test_every_row_is_a_picture_and_a_caption(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    before = {path: path.read_bytes() for path in tmp_path.rglob("set*/**/*") if path.is_file()}
    source = HuggingFaceSource(str(folder))
    assert files(source) == EXPECTED
    with source.open("0000003.jpg") as stream, Image.open(stream) as image:
        assert image.size == (11, 8)
    assert list(source.list()) == list(HuggingFaceSource(str(folder)).list())
    assert {path: path.read_bytes() for path in before} == before


def test_a_data_set_in_the_hubs_cache_is_found_by_its_id(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--someone--pictures"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    parquet(repository / "snapshots" / ("a" * 40))
    assert files(HuggingFaceSource("someone/pictures")) == EXPECTED
    with pytest.raises(DataError, match="download it first: hf download someone/others --repo-type dataset"):
        list(HuggingFaceSource("someone/others").list())
    with pytest.raises(DataError, match="/no/where does not exist"):
        list(HuggingFaceSource("/no/where").list())


def test_the_split_that_is_asked_for_is_read_and_another_is_refused(tmp_path: Path) -> None:
    for folder in (parquet(tmp_path / "parquet"), saved_splits(tmp_path / "saved")):
        assert len(files(HuggingFaceSource(str(folder), split="test"))) == 2
        with pytest.raises(DataError, match="has no split 'dev'; set split to one of test, train"):
            list(HuggingFaceSource(str(folder), split="dev").list())
    rows().to_parquet(tmp_path / "parquet" / "data" / "extra-00000-of-00001.parquet")
    assert len(files(HuggingFaceSource(str(tmp_path / "parquet"), split="extra"))) == 10


def test_columns_are_found_by_their_usual_names_or_named(tmp_path: Path) -> None:
    table = rows().rename_columns({"image": "photo", "text": "words"})
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="has no column named image, img, jpg or png; set image_column to one of photo, words"):
        list(HuggingFaceSource(str(tmp_path / "set")).list())
    with pytest.raises(DataError, match="has no column named caption, text or prompt; set caption_column"):
        list(HuggingFaceSource(str(tmp_path / "set"), image_column="photo").list())
    assert files(HuggingFaceSource(str(tmp_path / "set"), image_column="photo", caption_column="words")) == EXPECTED
    assert set(files(HuggingFaceSource(str(tmp_path / "set"), image_column="photo", captions=False))) == {
        f"000000{n}.jpg" for n in range(5)
    }
    with pytest.raises(DataError, match="has no column 'wrods'; set caption_column to one of"):
        list(HuggingFaceSource(str(tmp_path / "set"), image_column="photo", caption_column="wrods").list())


def test_columns_of_another_kind_are_refused(tmp_path: Path) -> None:
    rows(range(5), name="count", kind=datasets.Value("int64")).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="the column 'count' holds int64; set caption_column to one of texts"):
        list(HuggingFaceSource(str(tmp_path / "set"), caption_column="count").list())
    with pytest.raises(DataError, match="the column 'count' holds int64; set image_column to one of images"):
        list(HuggingFaceSource(str(tmp_path / "set"), image_column="count", captions=False).list())


@pytest.mark.parametrize(
    ("captions", "kind", "told"),
    [
        (["a", None, "", "ü", "b"], None, [b"a", None, b"", "ü".encode(), b"b"]),
        ([1, 0, -1, None, 1], datasets.ClassLabel(names=["cat", "dog"]), [b"dog", b"cat", None, None, b"dog"]),
        ([["a", "b\nc"], [], ["d"], None, [None]], datasets.Sequence(datasets.Value("string")), [b"a\nb c", b"", b"d", None, b""]),
    ],
)
def test_captions_that_are_null_classes_or_lists(captions: Any, kind: Any, told: Any, tmp_path: Path) -> None:
    rows(captions, kind=kind).save_to_disk(tmp_path / "set")
    source = HuggingFaceSource(str(tmp_path / "set"))
    found = files(source)
    assert [found.get(f"{row:07}.txt") for row in range(5)] == told
    for row, caption in enumerate(told):
        if caption is None:
            with pytest.raises(FileNotFoundError):
                source.read(f"{row:07}.txt")


def test_images_that_a_row_names_are_read_from_inside_the_dataset_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "set", tmp_path / "far.png"
    folder.mkdir()
    outside.write_bytes(PICTURES[0])
    (folder / "near.png").write_bytes(PICTURES[1])
    (folder / "nearer.png").write_bytes(PICTURES[0])
    paths = [str(folder / "nearer.png"), "near.png", "../far.png", "https://somewhere/x.png", "gone.png", str(outside)]
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths], "text": [*CAPTIONS, "far"]})
    pq.write_table(table, folder / "train.parquet")
    source = HuggingFaceSource(str(folder))
    assert [source.read("0000000.jpg"), source.read("0000001.jpg")] == PICTURES[:2]
    sizes = {entry.key: entry.size for entry in source.list() if entry.key.endswith("jpg")}
    assert list(sizes.values()) == [len(PICTURES[0]), len(PICTURES[1]), 0, 0, 0, 0]
    outside_it = "is not the name of a file inside"
    for row, said in ((2, outside_it), (5, outside_it), (3, "has only the URL https://somewhere/x.png"), (4, "No such file")):
        with pytest.raises(FileNotFoundError, match=said):
            source.read(f"{row:07}.jpg")


def test_a_row_without_a_picture_is_an_empty_file(tmp_path: Path) -> None:
    rows(pictures=[PICTURES[0], None, b"", PICTURES[3], PICTURES[4]]).save_to_disk(tmp_path / "set")
    found = files(HuggingFaceSource(str(tmp_path / "set")))
    assert found["0000001.jpg"] == found["0000002.jpg"] == b""


@pytest.mark.parametrize("key", ["0000005.jpg", "0000000.png", "5.jpg", "../x", "", "-000001.jpg"])
def test_what_is_no_row_is_not_there(key: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no row"):
        HuggingFaceSource(str(saved(tmp_path / "set"))).read(key)


def test_a_changed_data_set_is_noticed(tmp_path: Path) -> None:
    path = one_file(tmp_path / "set")
    before = list(HuggingFaceSource(str(path)).list())
    rows(pictures=PICTURES[::-1]).to_parquet(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    after = HuggingFaceSource(str(path))
    assert {entry.key for entry in before} == {entry.key for entry in after.list()}
    assert not set(before) & set(after.list())
    assert after.read("0000000.jpg") == PICTURES[4]


def test_a_data_set_that_is_not_whole_or_not_one_is_refused(tmp_path: Path) -> None:
    lacking = parquet(tmp_path / "lacking")
    (lacking / "data" / "train-00000-of-00002.parquet").unlink()
    double = parquet(tmp_path / "double")
    shutil.copytree(double / "data", double / "other")
    mixed = parquet(tmp_path / "mixed")
    (mixed / "x.arrow").write_bytes(b"")
    damaged = one_file(tmp_path / "damaged")
    damaged.write_bytes(b"PAR1" * 10)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(PICTURES[0])
    for path, said in (
        (lacking, "lacks 1 of 2 files of the dataset, such as number 0; download it again"),
        (double, "there is more than one dataset in .*double/data, .*double/other"),
        (mixed, "holds both .parquet and .arrow files"),
        (damaged, "mine.parquet cannot be opened as a dataset: "),
        (pictures, 'holds no .parquet or .arrow files; images in a folder are "type": "local"'),
    ):
        with pytest.raises(DataError, match=said):
            list(HuggingFaceSource(str(path)).list())


def test_no_script_of_a_data_set_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="holds no .parquet"):
        list(HuggingFaceSource(str(folder)).list())
    rows().to_parquet(folder / "train.parquet")
    assert files(HuggingFaceSource(str(folder))) == EXPECTED
    assert not (tmp_path / "ran").exists()


def test_many_threads_read_the_right_rows(tmp_path: Path) -> None:
    source = HuggingFaceSource(str(saved(tmp_path / "set")))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, list(EXPECTED) * 40)) == list(EXPECTED.values()) * 40
