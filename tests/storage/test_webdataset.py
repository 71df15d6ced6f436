from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.data.base.images import EXTENSIONS
from helpers.errors import DataError
from helpers.storage import webdataset
from helpers.storage.backend import Entry
from helpers.storage.tar import Member, Members
from helpers.storage.webdataset import WebDataset


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], **mode: Any) -> Path:
    with tarfile.open(path, "w", **mode) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def opened(*shards: Path) -> WebDataset:
    return WebDataset(shards, EXTENSIONS)


def listed(*shards: Path) -> dict[str, str]:
    """What is shown, with the kind of problem."""
    return {entry.key: entry.problem.partition(":")[0] for entry in opened(*shards).list()}


def test_members_are_shown_as_files_and_read_back_whatever_their_order(tmp_path: Path) -> None:
    files = {f"{number:04}.{ending}": os.urandom(number * 7) for number in range(50) for ending in ("jpg", "txt")}
    shuffled = random.Random(1).sample(list(files.items()), len(files))
    source = opened(write_tar(tmp_path / "b.tar", shuffled), write_tar(tmp_path / "a.tar", {"x.png": b"1"}))
    found = list(source.list())
    assert [entry.key for entry in found][0] == "a/x.png"
    assert sorted(entry.key for entry in found) == sorted(["a/x.png", *(f"b/{name}" for name in files)])
    for name, data in files.items():
        assert source.read(f"b/{name}") == data
        with source.open(f"b/{name}") as stream:
            assert stream.read(3) == data[:3] and stream.seek(5) == 5 and stream.read() == data[5:]


def test_the_order_depends_on_the_names_alone(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    names = ["b.jpg", "a-b.jpg", "a.jpg", "sub/c.jpg", "a.txt"]
    one = opened(write_tar(tmp_path / "one" / "s.tar", dict.fromkeys(names, b"1")), write_tar(tmp_path / "one" / "r.tar", {}))
    two = opened(write_tar(tmp_path / "two" / "r.tar", {}), write_tar(tmp_path / "two" / "s.tar", dict.fromkeys(names[::-1], b"1")))
    assert [entry.key for entry in one.list()] == [entry.key for entry in two.list()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_folders_dots_and_foreign_letters_is_read(tmp_path: Path, format: int) -> None:
    tail = "x" * (60 if format == tarfile.USTAR_FORMAT else 300)
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("./sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./sub/ünï.jpg", f"sub/{tail}.jpg", "__MACOSX/a.jpg"):
            header = tarfile.TarInfo(name)
            header.size = 4
            tar.addfile(header, io.BytesIO(b"data"))
    assert set(listed(path)) == {"s/sub/ünï.jpg", f"s/sub/{tail}.jpg", "s/__MACOSX/"}  # the last is a folder that is not read
    assert opened(path).read("s/sub/ünï.jpg") == b"data"


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"a.txt": b"text", "a.caption": b"other", "a.json": b'{"caption": "json"}'}, b"text"),
        ({"a.caption": b"other", "a.json": b'{"caption": "json"}', "a.cls": b"7"}, b"other"),
        ({"a.json": b'{"caption": "\xc3\xbcber", "width": 3}', "a.cls": b"7"}, "über".encode()),
        ({"a.TXT": b"LOUD"}, b"LOUD"),
    ],
)
def test_the_caption_of_a_picture_is_shown_beside_it(tmp_path: Path, members: dict[str, bytes], caption: bytes) -> None:
    path = write_tar(tmp_path / "s.tar", {**members, "a.jpg": b"picture"})
    assert set(listed(path)) == {"s/a.jpg", "s/a.txt"}
    assert opened(path).read("s/a.txt") == caption
    with opened(path).open("s/a.txt") as stream:
        assert stream.read() == caption


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"caption": 7}', b"\xff", b"[" * 100_000])
def test_a_json_without_a_caption_is_named(tmp_path: Path, content: bytes) -> None:
    source = opened(write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "a.json": content}))
    with pytest.raises(FileNotFoundError, match='a.json has no text for "caption"'):
        source.read("s/a.txt")


def test_further_pictures_of_a_sample_and_pickles_are_left_out_by_name(tmp_path: Path) -> None:
    names = ["a.jpg", "a.mask.png", "a.txt", "a.pyd", "b.v2.jpg", "b.txt", "c.1.jpg", "c.2.jpg", "d.json", "d.cls", "e.txt", "f.pickle"]
    assert listed(write_tar(tmp_path / "s.tar", dict.fromkeys(names, b"1"))) == {
        "s/a.jpg": "",
        "s/a.txt": "",
        "s/a.mask.png": "extra image",
        "s/a.pyd": "pickled",
        "s/b.v2.jpg": "",
        "s/b.v2.txt": "",  # b.txt, of the sample's one picture
        "s/c.1.jpg": "",
        "s/c.2.jpg": "",
        "s/d.json": "",
        "s/d.cls": "",
        "s/e.txt": "",
        "s/f.pickle": "pickled",
    }


def test_what_is_no_plain_file_inside_the_tar_is_listed_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, data in (
            ("a.jpg", tarfile.REGTYPE, b"first"),
            ("a.jpg", tarfile.REGTYPE, b"second"),
            ("link.jpg", tarfile.SYMTYPE, b""),
            ("hard.jpg", tarfile.LNKTYPE, b""),
            ("pipe.jpg", tarfile.FIFOTYPE, b""),
            ("/etc/x.jpg", tarfile.REGTYPE, b"1"),
            ("a/../../x.jpg", tarfile.REGTYPE, b"1"),
            ("caf\udce9.jpg", tarfile.REGTYPE, b"1"),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.size, header.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(header, io.BytesIO(data))
    again = next(key for key in listed(path) if "again" in key)
    assert listed(path) == {
        "s/a.jpg": "",
        again: "duplicate name",
        "s/link.jpg": "a link",
        "s/hard.jpg": "a link",
        "s/pipe.jpg": "not a plain file",
        "s//etc/x.jpg": "unsafe name",
        "s/a/../../x.jpg": "unsafe name",
        "s/caf\udce9.jpg": "",  # the scan says what is wrong with such a name
    }
    assert opened(path).read("s/a.jpg") == b"first"
    for key in ("s/link.jpg", "s//etc/x.jpg", "s/../s.tar", "t/a.jpg", "s/", ""):
        with pytest.raises(FileNotFoundError):
            opened(path).read(key)


def test_a_tar_that_is_cut_off_anywhere_gives_what_is_whole_and_says_so(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", {name: name.encode() * 100 for name in ("a.jpg", "b.jpg", "c.jpg")}).read_bytes()
    members = {f"s/{name}.jpg": 1024 * place + 512 + 500 for place, name in enumerate("abc")}  # key => where its last byte is
    for length in range(0, 3 * 1024 + 1, 100):
        path = tmp_path / "cut" / "s.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole[:length])
        found = {entry.key: entry.problem for entry in opened(path).list()}
        assert {key for key, problem in found.items() if not problem} == {key for key, end in members.items() if end <= length}
        assert "damaged tar: " in found["s.tar"]


def test_a_damaged_header_in_the_middle_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    data = bytearray(path.read_bytes())
    data[1024 + 20] ^= 0xFF
    path.write_bytes(data)
    assert [(entry.key, entry.problem) for entry in opened(path).list()] == [
        ("s.tar", "damaged tar: no header at byte 1024; the members before that are used"),
        ("s/a.jpg", ""),
    ]


def test_what_is_no_plain_tar_is_refused_by_name(tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(write_tar(tmp_path / "s.tar", {"a.jpg": b"1"}).read_bytes()))
    page = tmp_path / "page.tar"
    page.write_bytes(b"<html>" * 200)
    for path, said in (
        (packed, "packed.tar is compressed with gzip; decompress it"),
        (page, "page.tar is not a tar"),
        (tmp_path / "gone.tar", "gone.tar cannot be read: No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(DataError, match=said):
            list(opened(path).list())


def test_a_changed_tar_is_noticed_in_the_listing_and_while_it_is_in_use(tmp_path: Path) -> None:
    def entry(path: Path) -> Entry:
        [found] = opened(path).list()
        return found

    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"one"})
    source, before = opened(path), entry(path)
    assert source.read("s/a.jpg") == b"one"
    assert entry(path) == before
    write_tar(path, {"a.jpg": b"two"})
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    assert entry(path) != before
    with pytest.raises(OSError, match="was changed while it was in use"):
        source.read("s/a.jpg")


def test_headers_are_read_once_and_many_threads_read_the_right_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed = []
    really = webdataset.read_index
    monkeypatch.setattr(webdataset, "read_index", lambda path: indexed.append(path) or really(path))
    files = {f"{number}.jpg": bytes([number]) * 5000 for number in range(200)}
    source = opened(write_tar(tmp_path / "s.tar", files))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda name: source.read(f"s/{name}"), list(files) * 3))
    assert read == list(files.values()) * 3
    list(source.list())
    assert indexed == [tmp_path / "s.tar"]


def test_what_headers_say_is_kept_and_used_as_long_as_the_tar_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, indices = tmp_path / "s.tar", tmp_path / "cache" / "tars"
    write_tar(path, [("a.jpg", b"one"), ("a.jpg", b"again"), ("caf\udce9.jpg", b"2"), ("b.txt", b"three")])
    path.write_bytes(path.read_bytes()[: 4 * 1024])  # and without its end
    expected = list(opened(path).list())
    read = []
    really = webdataset.read_index
    monkeypatch.setattr(webdataset, "read_index", lambda path: read.append(path) or really(path))

    def listed_and_read() -> tuple[list[Entry], bytes]:
        source = WebDataset([path], EXTENSIONS, indices)
        return list(source.list()), source.read("s/a.jpg")

    first = listed_and_read()
    assert first == (expected, b"one")
    assert listed_and_read() == first and len(read) == 1
    [kept] = indices.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], whole.replace(b"a.jpg", b"x.jpg", 1), whole + b"1", b"\0" * len(whole)):
        kept.write_bytes(damaged)
        assert listed_and_read() == first
    assert len(read) == 7 and kept.read_bytes() == whole
    write_tar(path, {"a.jpg": b"two"})
    assert listed_and_read() == (list(opened(path).list()), b"two")
    assert len(list(indices.iterdir())) == 1


def test_an_index_finds_every_name_and_no_other() -> None:
    names = [f"{number * 7919 % 100_003:06}.jpg" for number in range(20_000)]
    members = Members.from_members(Member(name, place, place + 1) for place, name in enumerate(names))
    assert all(members.get(name) == Member(name, place, place + 1) for place, name in enumerate(names))
    assert [member.name for member in members] == sorted(names)
    assert members.get("") is members.get("000000.jp") is members.get("zzz") is None
