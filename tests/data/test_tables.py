"""Captions and sizes from tables: Parquet, JSON lines and CSV."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from helpers.data.base.sample import Size
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, ScanOptions, ScanResult, scan
from helpers.data.catalogue.table_join import JoinedTable
from helpers.data.catalogue.tables import TableRule
from helpers.data.plan.buckets import ResolutionRule
from helpers.data.report.dataset_report import summary
from helpers.errors import DataError, Interrupted, StorageError
from helpers.storage.local import LocalSource
from tests.data.test_scan import Watched, picture, reasons
from tests.storage.memory import MemoryBackend

Rows = list[dict[str, Any]]
BOTH = TableRule("t.parquet", "parquet", caption_column="description", width_column="width", height_column="height")
SIZES = replace(BOTH, caption_column=None)
CAPTIONS = replace(BOTH, width_column=None, height_column=None)


def parquet(rows: Rows, **types: pa.DataType) -> bytes:
    stream = io.BytesIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names}
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def jsonl(rows: Rows) -> bytes:
    return b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"


def json_list(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def comma_separated(rows: Rows) -> bytes:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


FORMATS: list[tuple[str, Callable[[Rows], bytes]]] = [
    ("parquet", parquet),
    ("jsonl", jsonl),
    ("jsonl", json_list),
    ("csv", comma_separated),
]


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.sqlite") as made:
        yield made


def rules(*tables: TableRule, strategy: Any = "parquet", **changed: Any) -> DatasetRules:
    if not any(table.caption_column for table in tables):
        strategy = "filename"
    return DatasetRules("set", ResolutionRule(0.25), CaptionRule(strategy, **changed), tables)


def images(*keys: str, **tables: bytes) -> dict[str, bytes]:
    """Files that are no images under images' names: whoever needs what is in them fails."""
    return {**dict.fromkeys(keys, b"never opened"), **{f"t.{ending}": data for ending, data in tables.items()}}


def told(catalogue: Catalogue) -> dict[str, tuple[Size, tuple[str, ...]]]:
    samples = [catalogue.sample(row) for row in catalogue.columns("set").rows]
    return {sample.key: (sample.size, sample.captions) for sample in samples}


ROWS: Rows = [
    {"id": "a", "description": "an ant", "width": 640, "height": 480},
    {"id": "sub/b.png", "description": 'a "bee",\nsitting', "width": 300, "height": 500},
    {"id": "./c.jpg", "description": "  une abeille 🐝 ", "width": 64, "height": 64},
]


@pytest.mark.parametrize(("format", "write"), FORMATS, ids=["parquet", "jsonl", "json list", "csv"])
def test_captions_and_sizes_come_from_any_table_and_only_a_sample_of_headers_is_read(
    format: str, write: Callable[[Rows], bytes], catalogue: Catalogue
) -> None:
    store = Watched({**images("a.jpg", "sub/b.png", "c.jpg"), "t.any": write(ROWS)})
    table = replace(BOTH, path="t.any", format=format)
    result = scan(store, rules(table, strategy=format), catalogue)
    assert told(catalogue) == {
        "a.jpg": (Size(640, 480), ("an ant",)),
        "c.jpg": (Size(64, 64), ("une abeille 🐝",)),
        "sub/b.png": (Size(300, 500), ('a "bee",\nsitting',)),
    }
    assert (result.found, result.used, result.left_out, result.opened) == (3, 3, 0, 0)
    assert store.opened == ["t.any", "a.jpg", "sub/b.png"], "of images that are no squares, a sample is compared"
    assert result.tables == (JoinedTable("t.any", 3, 0, 0, compared=0),)
    store.opened.clear()
    assert scan(store, rules(table, strategy=format), catalogue).tables == result.tables
    assert store.opened == [], "a table that has not changed is not read again"


def test_every_image_that_a_table_does_not_serve_is_left_out_with_its_reason(catalogue: Catalogue) -> None:
    rows: Rows = [
        {"id": "good", "description": "good", "width": 64, "height": 64},
        {"id": "twice", "description": "one", "width": 64, "height": 64},
        {"id": "twice", "description": "two", "width": 64, "height": 64},
        {"id": "silent", "description": None, "width": 64, "height": 64},
        {"id": "blank", "description": " \n", "width": 64, "height": 64},
        {"id": "sizeless", "description": "x", "width": None, "height": 64},
        {"id": "flat", "description": "x", "width": 64, "height": 0},
        {"id": "vast", "description": "x", "width": 60_000, "height": 60_000},
        {"id": "tiny", "description": "x", "width": 5, "height": 5},
        {"id": "gone", "description": "x", "width": 64, "height": 64},
        {"id": None, "description": "x", "width": 64, "height": 64},
        {"id": "", "description": "x", "width": 64, "height": 64},
    ]
    named = [f"{row['id']}.png" for row in rows if row["id"] not in (None, "", "gone")]
    files = images(*dict.fromkeys(named), "unknown.png", "stray.md", parquet=parquet(rows))
    smallest = replace(rules(BOTH), resolution=ResolutionRule(0.25, minimum_image_size=0.001))
    result = scan(MemoryBackend(files), smallest, catalogue)
    assert (result.found, result.used, result.left_out) == (10, 1, 9)
    assert result.tables == (JoinedTable("t.parquet", 12, 2, 1, "gone"),)
    assert reasons(catalogue) == {
        "blank.png": "empty caption: the column description of t.parquet is empty",
        "flat.png": "no size: the column height of t.parquet has 0",
        "silent.png": "empty caption: the column description of t.parquet is empty",
        "sizeless.png": "no size: the column width of t.parquet is empty",
        "stray.md": "not an image: its name ends in .md",
        "tiny.png": "below 0.001 megapixels: 5x5",
        "twice.png": "several rows: t.parquet has 2 rows of this name",
        "unknown.png": "not in the table: t.parquet has no row of this name; a row that names no image has 'gone'",
        "vast.png": "too large: 60000x60000, more than 256 megapixels",
    }


def test_a_fallback_column_speaks_where_the_first_is_silent(catalogue: Catalogue) -> None:
    rows: Rows = [{"id": "a", "description": None, "alt": "from alt"}, {"id": "b", "description": "own", "alt": "unused"}]
    table = replace(CAPTIONS, fallback_caption_column="alt")
    scan(MemoryBackend({"a.png": picture(), "b.png": picture(), "t.parquet": parquet(rows)}), rules(table), catalogue)
    assert list(catalogue.captions("set")) == ["from alt", "own"]


def test_a_list_column_gives_several_captions_when_asked_and_is_refused_otherwise(catalogue: Catalogue) -> None:
    rows: Rows = [{"id": "a", "description": ["one", " two ", "", None, "one"]}, {"id": "b", "description": []}]
    store = MemoryBackend({"a.png": picture(), "b.png": picture(), "t.parquet": parquet(rows, description=pa.list_(pa.string()))})
    with pytest.raises(DataError, match="t.parquet: the column 'description' holds lists of captions; set multiple_captions to true"):
        scan(store, rules(CAPTIONS), catalogue)
    scan(store, rules(replace(CAPTIONS, lists=True), multiple=True), catalogue)
    assert told(catalogue) == {"a.png": (Size(40, 30), ("one", "two", "one"))}
    assert list(catalogue.captions("set")) == ["one", "two"]
    assert reasons(catalogue)["b.png"].startswith("empty caption")


@pytest.mark.parametrize(
    ("ends", "names", "found"),
    [
        (None, ["a.png", "b"], {"a.png", "b.png"}),
        (True, ["a.png", "b"], {"a.png"}),
        (False, ["a.png", "b"], {"b.png"}),
    ],
)
def test_names_are_found_with_or_without_their_ending(ends: bool | None, names: list[str], found: set[str], catalogue: Catalogue) -> None:
    table = parquet([{"id": name, "width": 64, "height": 64} for name in names])
    scan(MemoryBackend(images("a.png", "b.png", parquet=table)), rules(replace(SIZES, includes_extension=ends)), catalogue)
    assert set(catalogue.keys("set")) == found


def test_the_whole_name_counts_before_the_name_without_ending(catalogue: Catalogue) -> None:
    rows: Rows = [{"id": "a", "width": 1, "height": 1}, {"id": "a.png", "width": 2, "height": 2}]
    scan(MemoryBackend(images("a.jpg", "a.png", parquet=parquet(rows))), rules(SIZES), catalogue)
    assert {key: size for key, (size, _) in told(catalogue).items()} == {"a.jpg": Size(1, 1), "a.png": Size(2, 2)}


def test_where_names_are_numbers_leading_zeros_of_files_do_not_count(catalogue: Catalogue) -> None:
    files = images("000123.jpg", "7.jpg", "000.jpg", "x1.jpg")
    numbers: Rows = [{"id": number, "width": 64, "height": 64} for number in (123, 7, 0)]
    assert scan(MemoryBackend({**files, "t.parquet": parquet(numbers)}), rules(SIZES), catalogue).used == 3
    texts: Rows = [{**row, "id": str(row["id"])} for row in numbers]
    assert scan(MemoryBackend({**files, "t.parquet": parquet(texts)}), rules(SIZES), catalogue).used == 1


def test_sizes_and_captions_may_stand_in_two_tables(catalogue: Catalogue) -> None:
    sizes = parquet([{"id": "a", "width": 640, "height": 480}])
    said = comma_separated([{"file": "a.png", "text": "said"}])
    table = TableRule("t.csv", "csv", filename_column="file", caption_column="text")
    result = scan(MemoryBackend(images("a.png", parquet=sizes, csv=said)), rules(SIZES, table, strategy="csv"), catalogue)
    assert told(catalogue) == {"a.png": (Size(640, 480), ("said",))}
    assert (result.found, len(result.tables)) == (1, 2)


@pytest.mark.parametrize("path", ["t.csv", "t.tsv"])
def test_sizes_in_texts_are_numbers_and_captions_that_look_like_numbers_are_texts(path: str, catalogue: Catalogue) -> None:
    data = comma_separated([{"id": "001", "description": "007", "width": "64", "height": "32.0"}])
    data = data.replace(b",", b"\t") if path.endswith("tsv") else data
    table = replace(BOTH, path=path, format="csv")
    scan(MemoryBackend({**images("001.png", "1.png"), path: data}), rules(table, strategy="csv"), catalogue)
    assert told(catalogue) == {"001.png": (Size(64, 32), ("007",))}


@pytest.mark.parametrize(
    ("format", "data", "said"),
    [
        ("parquet", b"PAR1 no", "t is not a Parquet table, or is damaged: "),
        (
            "parquet",
            parquet([{"id": "a", "descripton": "x"}]),
            r"t has no column 'description' \(did you mean descripton\?\); it has",
        ),
        ("csv", b"id,text\na,b\n", "t has no column 'description'; it has id, text"),
        ("csv", b"", "t has no column 'id'; it has none"),
        ("csv", b"\xef\xbb\xbfid;description\r\na;b\r\n", r"t separates columns with semicolons \(id;description\); save it with commas"),
        ("csv", b"id,id,description\n", "t has 2 columns 'id'; rename all but one"),
        (
            "csv",
            b"id,description\na,b\nc,a cat, a mat\n",
            "t, line 3: 3 values for 2 columns; a value that contains a comma must be in dou",
        ),
        ("csv", b'id,description\na,"b\n', "t, line 2: the closing quote of a value is missing"),
        ("csv", b"id,description\na,caf\xe9\n", "t, line 2 is not UTF-8; save the file as UTF-8."),
        ("jsonl", b'{"id": "a", "description": "x"}\n{"id": \n', "t, line 2 is not JSON: "),
        ("csv", b'id,description\na,"two\nlines"\nb,caf\xe9\n', "t, line 4 is not UTF-8"),
        ("csv", b'id,description\r\na,"two\r\nlines"\r\nb,"c"d\r\n', "t, line 4: text follows the closing quote"),
        ("csv", b"id\rdescription\r", "t has no column 'description'"),
        ("csv", b"id, description\na,b\n", r"t has no column 'description' \(did you mean ' description'\?\); it has id, ' description'"),
        ("jsonl", b'{"id": "a", "description": "caf\xe9"}', "t, line 1 is not UTF-8"),
        ("jsonl", b'{"id": "a"}\n[1]\n', r"t, line 2: \[1\] is not a JSON object"),
        ("jsonl", b'[{"id": "a", "description": "x"}, 7]', "t, element 2: 7 is not a JSON object"),
        ("jsonl", b'{"id": "a", "text": "x"}\n', "t has no column 'description'; it has id, text"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(format: str, data: bytes, said: str, catalogue: Catalogue) -> None:
    table = replace(CAPTIONS, path="t", format=format)
    with pytest.raises(DataError, match=said):
        scan(MemoryBackend({"a.png": picture(), "t": data}), rules(table, strategy=format), catalogue)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_parquet_table_that_is_damaged_anywhere_is_one_sentence(share: float, catalogue: Catalogue) -> None:
    whole = parquet([{"id": f"picture {index}", "description": f"caption {index * 7919}"} for index in range(500)])
    place = int(share * len(whole))
    damaged = whole[:place] + bytes(byte ^ 0xA5 for byte in whole[place : place + 200]) + whole[place + 200 :]
    for data in (damaged, whole[:place]):
        try:
            scan(MemoryBackend({"a.png": picture(), "t.parquet": data}), rules(CAPTIONS), catalogue)
        except DataError as error:
            assert "t.parquet" in str(error)


def test_a_disk_that_fails_under_a_table_is_the_machines_fault(catalogue: Catalogue) -> None:
    class Failing(MemoryBackend):
        def open(self, key: str) -> BinaryIO:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageError, match=r"memory: t\.parquet could not be read: Input/output error"):
        scan(Failing(images("a.png", parquet=parquet(ROWS))), rules(BOTH), catalogue)


def test_a_table_that_is_missing_is_named_with_its_place(tmp_path: Path, catalogue: Catalogue) -> None:
    with pytest.raises(DataError, match="dataset 'set': there is no table t.parquet in memory; check its path"):
        scan(MemoryBackend({"a.png": picture()}), rules(CAPTIONS), catalogue)
    absolute = replace(CAPTIONS, path=str(tmp_path / "nowhere.parquet"))
    with pytest.raises(DataError, match=r"the table .*nowhere\.parquet cannot be opened: No such file"):
        scan(MemoryBackend({"a.png": picture()}), rules(absolute), catalogue)


def test_captions_that_are_no_text_are_left_out_by_name(catalogue: Catalogue) -> None:
    lines = b'{"id": "a", "description": 7}\n{"id": "b", "description": "\\ud83d"}\n{"id": "c", "description": "c"}\n'
    table = replace(CAPTIONS, path="t.jsonl", format="jsonl")
    files = {f"{name}.png": picture() for name in "abc"}
    assert scan(MemoryBackend({**files, "t.jsonl": lines}), rules(table, strategy="jsonl"), catalogue).used == 1
    assert reasons(catalogue) == {
        "a.png": "caption is not text: the column description of t.jsonl has 7",
        "b.png": "caption is not UTF-8: the column description of t.jsonl has half of a surrogate pair",
    }


# -- changes ----------------------------------------------------------------------------------------------------------------


def test_a_changed_table_is_read_again_and_only_it(catalogue: Catalogue) -> None:
    store = Watched(images("a.png", "b.png", parquet=parquet(ROWS[:1])))
    assert store.reopened(rules(BOTH), catalogue) == ["a.png", "t.parquet"]
    assert reasons(catalogue).keys() == {"b.png"}
    catalogue.set_content([(int(catalogue.columns("set").rows[0]), "f" * 64)])
    store.write("t.parquet", parquet([{**ROWS[0], "description": "other"}, {**ROWS[0], "id": "b"}]))
    assert store.reopened(rules(BOTH), catalogue) == ["a.png", "b.png", "t.parquet"]
    assert list(catalogue.captions("set")) == ["an ant", "other"]
    assert list(catalogue.contents("set")) == ["f" * 64, None], "a file's bytes are known whatever the table says"
    store.write("c.jpg", b"never opened")
    assert store.reopened(rules(BOTH), catalogue) == ["a.png", "b.png", "t.parquet"]
    assert reasons(catalogue).keys() == {"c.jpg"}


def test_another_column_is_another_table(catalogue: Catalogue) -> None:
    rows: Rows = [{"id": "a", "description": "one", "other": "two"}]
    store = Watched({"a.png": picture(), "t.parquet": parquet(rows)})
    scan(store, rules(CAPTIONS), catalogue)
    assert store.reopened(rules(replace(CAPTIONS, caption_column="other")), catalogue) == ["t.parquet"]
    assert list(catalogue.captions("set")) == ["two"]


def test_sizes_from_a_table_are_forgotten_when_they_come_from_the_images_again(catalogue: Catalogue) -> None:
    store = Watched({"a.png": picture(40, 30), "t.parquet": parquet([{"id": "a", "width": 4, "height": 3}])})
    by_name = DatasetRules("set", ResolutionRule(0.25), CaptionRule("filename"))
    for _ in range(2):
        assert store.reopened(rules(SIZES), catalogue) == ["a.png", "t.parquet"], "its header is compared"
        assert told(catalogue)["a.png"][0] == Size(4, 3)
        assert store.reopened(by_name, catalogue) == ["a.png"]
        assert told(catalogue)["a.png"][0] == Size(40, 30)
    assert reasons(catalogue) == {"t.parquet": "not an image: its name ends in .parquet"}, "a table that nothing names is a stray file"


def test_an_image_left_out_for_its_size_is_tried_again_once_the_table_says_another(catalogue: Catalogue) -> None:
    store = MemoryBackend(images("a.png", "b.png", parquet=parquet([{"id": name, "width": 64, "height": 32} for name in "ab"])))
    scan(store, rules(SIZES), catalogue)
    for row in catalogue.columns("set").rows[:2]:
        catalogue.add_failure(0, int(row), "wrong size: the image is 32x64", undecodable=True)
    catalogue.leave_out_undecodable()
    right: Rows = [{"id": "a", "width": 32, "height": 64}, {"id": "b", "width": 64, "height": 32}]
    store.write("t.parquet", parquet(right))
    scan(store, rules(SIZES), catalogue)
    assert reasons(catalogue) == {"b.png": "wrong size: the image is 32x64"}


def test_a_stop_while_a_table_is_read_leaves_the_catalogue_as_it_was(catalogue: Catalogue) -> None:
    store = MemoryBackend(images("a.png", parquet=parquet(ROWS[:1])))
    with pytest.raises(Interrupted):
        scan(store, rules(BOTH), catalogue, ScanOptions(should_stop=lambda: True))
    assert scan(store, rules(BOTH), catalogue).used == 1


def test_a_store_whose_streams_cannot_seek_will_do(catalogue: Catalogue) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *place: int) -> int:
            raise io.UnsupportedOperation("seek")

    class Streaming(MemoryBackend):
        def open(self, key: str) -> BinaryIO:
            return Pipe(self.read(key))

    result: ScanResult = scan(Streaming(images("a.png", parquet=parquet(ROWS[:1]))), rules(BOTH), catalogue)
    assert result.used == 1


def test_a_table_anywhere_on_this_machine_is_found_and_watched(tmp_path: Path, catalogue: Catalogue) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"never opened")
    path = tmp_path / "elsewhere.parquet"
    path.write_bytes(parquet(ROWS[:1]))
    there = rules(replace(BOTH, path=str(path)))
    assert scan(LocalSource(tmp_path / "data"), there, catalogue).used == 1
    path.write_bytes(parquet([{**ROWS[0], "description": "changed"}]))
    os.utime(path, ns=(0, 1))
    scan(LocalSource(tmp_path / "data"), there, catalogue)
    assert list(catalogue.captions("set")) == ["changed"]


NAME = TableRule("t.jsonl", "jsonl", filename_column="file", caption_column="text")


def captions_by_key(names: list[object], keys: list[str], folder: Path, **settings: object) -> dict[str, str]:
    """The captions of images in a folder whose table has these names in place of the keys, in the same order."""
    for key in keys:
        (folder / "set" / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / key).write_bytes(picture())
    rows = [json.dumps({"file": name, "text": f"row {place}"}) for place, name in enumerate(names)]
    (folder / "set" / "t.jsonl").write_text("\n".join(rows))
    with Catalogue(folder / "catalogue.sqlite") as opened, contextlib.suppress(DataError):
        scan(LocalSource(folder / "set"), rules(replace(NAME, **settings), strategy="jsonl"), opened)
        return {key: captions[0] for key, (_, captions) in told(opened).items()}
    return {}


@pytest.mark.parametrize(
    "spell",
    [
        lambda key, root: f"{root}/{key}",
        lambda key, root: f"set/{key}",
        lambda key, root: f"./{key}",
        lambda key, root: "D:\\" + "\\".join(("my", "set", *key.split("/"))),
        lambda key, root: f"/home/someone/else/{key}",
        lambda key, root: f"file://{root}/{key}",
        lambda key, root: key.replace(".png", ".jpg"),
        lambda key, root: key.replace(".png", ".PNG"),
        lambda key, root: f" {key} ",
        lambda key, root: unicodedata.normalize("NFD", key),
        lambda key, root: key.rpartition("/")[2].removesuffix(".png"),
    ],
    ids=["absolute", "folder", "dot", "windows", "elsewhere", "url", "extension", "case", "blanks", "unicode", "basename"],
)
def test_a_name_spelled_differently_means_the_only_image_that_it_can_mean(spell: Callable[[str, Path], str], tmp_path: Path) -> None:
    keys = ["décor.png", "sub/v1.5.png", "sub/deep/c.png"]
    names: list[object] = [spell(key, tmp_path / "set") for key in keys]
    assert captions_by_key(names, keys, tmp_path) == {key: f"row {place}" for place, key in enumerate(keys)}


def test_numbers_with_a_fraction_of_zero_are_whole_numbers(tmp_path: Path) -> None:
    assert captions_by_key([7.0, 12.0], ["7.png", "0012.png"], tmp_path) == {"7.png": "row 0", "0012.png": "row 1"}
    assert captions_by_key(["7.0", "12.0"], ["7.png", "12.png"], tmp_path / "texts") == {"7.png": "row 0", "12.png": "row 1"}


@pytest.mark.parametrize(
    ("names", "keys", "found"),
    [
        (["cat"], ["a/cat.png", "b/cat.png"], {}),  # two images for one row
        (["x/CAT.png", "y/cat.png"], ["cat.png"], {}),  # two rows for one image, in two folders
        (["CAT.png", "Cat.png"], ["cat.png"], {}),
        (["cat.jpg", "cat.png"], ["cat.png"], {"cat.png": "row 1"}),  # the exact name counts first
        (["set/dog", "other/cat"], ["cat.png", "dog.png"], {"dog.png": "row 0"}),  # another folder means other images
    ],
)
def test_a_name_that_may_mean_several_images_means_none(
    names: list[object], keys: list[str], found: dict[str, str], tmp_path: Path
) -> None:
    assert captions_by_key(names, keys, tmp_path) == found


def test_a_setting_for_extensions_holds_for_other_spellings_too(tmp_path: Path) -> None:
    assert captions_by_key(["set/a.jpg"], ["a.png"], tmp_path / "1", includes_extension=True) == {}
    assert captions_by_key(["set/a.png"], ["a.png"], tmp_path / "2", includes_extension=True) == {"a.png": "row 0"}
    assert captions_by_key(["set/a.png"], ["a.png.png"], tmp_path / "3", includes_extension=False) == {"a.png.png": "row 0"}


def test_where_names_do_not_fit_one_of_the_table_is_shown(catalogue: Catalogue) -> None:
    table = b'{"file": "a.png", "text": "x"}\n{"file": "elsewhere_17", "text": "y"}'
    files = {"a.png": picture(), "b.png": picture(), "t.jsonl": table}
    result = scan(MemoryBackend(files), rules(NAME, strategy="jsonl"), catalogue)
    assert reasons(catalogue) == {
        "b.png": "not in the table: t.jsonl has no row of this name; a row that names no image has 'elsewhere_17'"
    }
    assert summary(result).endswith(" · 1 of 2 rows of t.jsonl name no image, such as 'elsewhere_17'")


def test_a_table_made_without_regard_to_rotation_is_not_believed(catalogue: Catalogue) -> None:
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 30)).save(rotated, "JPEG", exif=exif)
    files = {f"{number:03}.jpg": rotated.getvalue() if number % 50 == 0 else picture(format="JPEG") for number in range(200)}
    rows: Rows = [{"id": name, "description": "x", "width": 40, "height": 30} for name in files]
    store = Watched({**files, "t.jsonl": jsonl(rows)})
    table = replace(BOTH, path="t.jsonl", format="jsonl")
    result = scan(store, rules(table, strategy="jsonl"), catalogue)
    (joined,) = result.tables
    assert joined.compared == 64 and joined.swapped >= 1 and result.used == 200
    assert told(catalogue)["050.jpg"][0] == Size(30, 40) and told(catalogue)["051.jpg"] == (Size(40, 30), ("x",))
    assert f"t.jsonl has sizes before EXIF rotation ({joined.swapped} of 64 images compared)" in summary(result)
    assert store.reopened(rules(table, strategy="jsonl"), catalogue) == []
    store.write("new.jpg", rotated.getvalue())
    scan(store, rules(table, strategy="jsonl"), catalogue)
    assert told(catalogue)["050.jpg"][0] == Size(30, 40)


def test_a_long_caption_in_csv_is_a_caption_and_a_longer_one_leaves_out_its_image(catalogue: Catalogue) -> None:
    rows: Rows = [
        {"id": name, "description": "word " * count, "width": 64, "height": 64} for name, count in (("a", 30_000), ("b", 300_000))
    ]
    store = MemoryBackend({**images("a.png", "b.png"), "t.csv": comma_separated(rows)})
    table = replace(BOTH, path="t.csv", format="csv")
    assert scan(store, rules(table, strategy="csv"), catalogue).used == 1
    assert reasons(catalogue)["b.png"].startswith("caption too long: ")
