from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from helpers.config.datasets import DatasetConfig
from helpers.data.base.sample import LeftOut, Sample, Size
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, ScanOptions, scan
from helpers.data.plan.targets import ResolutionRule
from helpers.data.report.dataset_report import summary
from helpers.data.report.overlaps import overlap_lines
from helpers.data.sources import open_source
from helpers.errors import DataError, Interrupted, StorageError
from helpers.storage.local import LocalSource
from helpers.storage.two_folders import WithCaptionFolder
from tests.data.toys import dataset
from tests.storage.memory import MemoryBackend

RULES = DatasetRules("set", ResolutionRule(0.25), CaptionRule("textfile"))
BY_NAME = replace(RULES, captions=CaptionRule("filename"))


def picture(width: int = 40, height: int = 30, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(stream, format)
    return stream.getvalue()


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "cache" / "catalogue.sqlite") as made:
        yield made


class Watched(MemoryBackend):
    """Remembers what was opened."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.opened: list[str] = []

    def open(self, key: str) -> BinaryIO:
        self.opened.append(key)
        return super().open(key)

    def reopened(self, rules: DatasetRules, catalogue: Catalogue) -> list[str]:
        self.opened.clear()
        scan(self, rules, catalogue)
        return sorted(self.opened)


def reasons(catalogue: Catalogue) -> dict[str, str]:
    return {entry.key: entry.reason for entry in catalogue.left_out("set")}


def test_every_file_is_used_or_left_out_with_its_reason(catalogue: Catalogue) -> None:
    files = {
        "good.png": picture(),
        "good.txt": b"a good one",
        "Loud.JPG": picture(format="JPEG"),
        "Loud.TXT": b"LOUD",
        "silent.png": picture(),
        "empty.png": picture(),
        "empty.txt": b" \n",
        "latin.png": picture(),
        "latin.txt": b"caf\xe9",
        "page.jpg": b"<html>404</html>",
        "zero.jpg": b"",
        "zero.txt": b"of nothing",
        "stray.txt": b"a caption of nothing",
        "film.mp4": b"...",
        "README": b"...",
    }
    result = scan(MemoryBackend(files), RULES, catalogue)
    assert (result.found, result.used, result.left_out) == (10, 2, 8)
    assert [catalogue.sample(row).captions for row in catalogue.columns("set").rows] == [("LOUD",), ("a good one",)]
    assert reasons(catalogue) == {
        "README": "not an image: its name has no ending",
        "empty.png": "empty caption: empty.txt holds no text",
        "film.mp4": "not an image: its name ends in .mp4",
        "latin.png": "caption is not UTF-8: latin.txt; save it as UTF-8 text",
        "page.jpg": "unreadable: this is a web page or XML, not an image",
        "silent.png": "no caption: silent.txt is missing",
        "stray.txt": "caption without an image: no image has this name",
        "zero.jpg": "unreadable: the file is empty",
    }
    assert result.kinds == {
        "unreadable": 2,
        "not an image": 2,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "no caption": 1,
        "caption without an image": 1,
    }


def test_images_stand_in_key_order_with_their_shown_sizes(catalogue: Catalogue) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (50, 20)).save(stream, "JPEG", exif=exif)
    scan(MemoryBackend({"z.png": picture(40, 30), "a/b.jpg": stream.getvalue(), "a.png": picture(7, 5)}), BY_NAME, catalogue)
    columns = catalogue.columns("set")
    assert list(catalogue.keys("set")) == ["a.png", "a/b.jpg", "z.png"]
    assert list(zip(columns.width.tolist(), columns.height.tolist(), strict=True)) == [(7, 5), (20, 50), (40, 30)]
    assert catalogue.sample(columns.rows[1]) == Sample("set", "a/b.jpg", Size(20, 50), ("b",))
    assert list(catalogue.captions("set")) == ["a", "b", "z"]
    with pytest.raises(KeyError):
        catalogue.sample(10**6)


def test_a_second_scan_opens_nothing_and_a_third_only_what_changed(catalogue: Catalogue) -> None:
    store = Watched({f"{name}.{ending}": picture() if ending == "png" else name.encode() for name in "abc" for ending in ("png", "txt")})
    assert store.reopened(RULES, catalogue) == ["a.png", "a.txt", "b.png", "b.txt", "c.png", "c.txt"]
    assert store.reopened(RULES, catalogue) == []
    rows = catalogue.columns("set").rows.tolist()
    catalogue.set_content((row, f"{row:064x}") for row in rows)

    store.write("b.png", picture(8, 9))
    store.write("c.txt", b"another")
    store.write("d.png", picture())
    store.delete("a.png")
    assert store.reopened(RULES, catalogue) == ["b.png", "c.txt", "d.png"]
    assert reasons(catalogue) == {"a.txt": "caption without an image: no image has this name", "d.png": "no caption: d.txt is missing"}
    samples = [catalogue.sample(row) for row in catalogue.columns("set").rows]
    assert [(sample.key, sample.size, sample.captions) for sample in samples] == [
        ("b.png", Size(8, 9), ("b",)),
        ("c.png", Size(40, 30), ("another",)),
    ]
    assert list(catalogue.contents("set")) == [None, f"{rows[2]:064x}"]


def test_other_rules_need_no_file_opened_again(catalogue: Catalogue) -> None:
    store = Watched({"a_cat.png": picture(40, 30), "a_cat.txt": b"the cat", "b.png": picture(400, 300), "b.txt": b"b"})
    scan(store, RULES, catalogue)
    larger = replace(RULES, resolution=ResolutionRule(64, "pixel", minimum_image_size=64))
    assert store.reopened(larger, catalogue) == []
    assert reasons(catalogue) == {"a_cat.png": "below 64 px: 40x30"}
    assert store.reopened(BY_NAME, catalogue) == []
    assert list(catalogue.captions("set")) == ["a cat", "b"]
    assert store.reopened(RULES, catalogue) == []
    assert list(catalogue.captions("set")) == ["b", "the cat"]


def test_captions_are_opened_only_where_they_are_read(catalogue: Catalogue) -> None:
    store = Watched({"a.png": picture(), "a.txt": b"text"})
    assert store.reopened(BY_NAME, catalogue) == ["a.png"]
    assert store.reopened(RULES, catalogue) == ["a.txt"]


def test_several_data_sets_share_a_catalogue(catalogue: Catalogue) -> None:
    scan(MemoryBackend({"a.png": picture(), "b.png": picture()}), BY_NAME, catalogue)
    scan(MemoryBackend({"a.png": picture(5, 5)}), replace(BY_NAME, dataset="other"), catalogue)
    assert list(catalogue.keys("set")) == ["a.png", "b.png"]
    assert catalogue.columns("other").width.tolist() == [5]


def test_two_captions_that_differ_in_letter_case_are_one(catalogue: Catalogue) -> None:
    result = scan(MemoryBackend({"a.png": picture(), "a.txt": b"lower", "a.TXT": b"upper"}), RULES, catalogue)
    assert (result.found, result.used) == (1, 1)
    assert list(catalogue.captions("set")) == ["upper"]


def test_what_was_left_out_when_a_run_began_stays_left_out_also_in_a_catalogue_made_anew(catalogue: Catalogue) -> None:
    store = Watched({"a.png": picture(), "b.png": picture()})
    assert scan(store, BY_NAME, catalogue, undecodable=["a.png"]).used == 1
    assert reasons(catalogue) == {"a.png": "unreadable: it could not be decoded when this run started, and stays left out"}


def test_an_image_whose_pixels_proved_damaged_is_left_out_by_the_next_new_run(catalogue: Catalogue) -> None:
    store = Watched({"a.png": picture(), "b.png": picture()})
    scan(store, BY_NAME, catalogue)
    catalogue.add_failure(0, int(catalogue.columns("set").rows[0]), "unreadable: image file is truncated", undecodable=True)
    catalogue.add_failure(0, int(catalogue.columns("set").rows[1]), "cannot be opened: for now", undecodable=False)
    assert scan(store, BY_NAME, catalogue).used == 2, "no checkpoint holds the plan yet"
    catalogue.leave_out_undecodable()
    assert list(catalogue.keys("set")) == ["a.png", "b.png"], "the plan in use stays"
    assert scan(store, BY_NAME, catalogue, undecodable=()).used == 2
    assert scan(store, BY_NAME, catalogue).used == 1
    assert reasons(catalogue) == {"a.png": "unreadable: image file is truncated"}
    assert catalogue.undecodable("set") == ["a.png"]
    store.write("a.png", picture(9, 9))
    assert scan(store, BY_NAME, catalogue).used == 2


# On a disk.


def hash_of_tree(root: Path) -> str:
    """Names, bytes, modes and modification times of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*"), key=os.fsencode):
        found = path.lstat()
        digest.update(repr((os.fsencode(path), found.st_mode, found.st_mtime_ns, found.st_size)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def messy_folder(root: Path) -> None:
    (root / "sub").mkdir(parents=True)
    for index in range(20):
        (root / "sub" / f"{index:02}.png").write_bytes(picture(40 + index, 30))
        (root / "sub" / f"{index:02}.txt").write_text(f"number {index}")
    (root / "x.png").mkdir()
    (root / "half.jpg").write_bytes(picture(format="JPEG")[:20])
    (root / "loop").symlink_to(root)
    (root / "dead.jpg").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png")).write_bytes(picture())


def test_a_scan_leaves_the_data_as_it_was_and_finds_the_same_in_a_read_only_copy(tmp_path: Path, catalogue: Catalogue) -> None:
    messy_folder(tmp_path / "data")
    before = hash_of_tree(tmp_path / "data")
    result = scan(LocalSource(tmp_path / "data"), RULES, catalogue)
    assert hash_of_tree(tmp_path / "data") == before
    assert (result.found, result.used) == (23, 20)
    assert reasons(catalogue)["dead.jpg"] == "cannot be opened: No such file or directory"
    assert reasons(catalogue)["caf\\xe9.png"] == "file name is not UTF-8: rename the file"
    for path in (tmp_path / "data" / "sub", tmp_path / "data"):
        path.chmod(0o555)
    try:
        with Catalogue(tmp_path / "again.sqlite") as again:
            assert scan(LocalSource(tmp_path / "data"), RULES, again) == result
            assert list(again.left_out("set")) == list(catalogue.left_out("set"))
    finally:
        for path in (tmp_path / "data" / "sub", tmp_path / "data"):
            path.chmod(0o755)


def test_a_file_that_could_not_be_opened_is_tried_again(tmp_path: Path, catalogue: Catalogue) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(picture())
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "target.png")
    (tmp_path / "data" / "c.png").write_bytes(picture())
    (tmp_path / "data" / "c.txt").symlink_to(tmp_path / "target.txt")
    assert scan(LocalSource(tmp_path / "data"), RULES, catalogue).used == 1
    assert reasons(catalogue) == {
        "b.png": "cannot be opened: No such file or directory",
        "c.png": "caption cannot be opened: No such file or directory",
    }
    (tmp_path / "target.png").write_bytes(picture())
    (tmp_path / "data" / "b.txt").write_text("b")
    (tmp_path / "target.txt").write_text("c")
    assert scan(LocalSource(tmp_path / "data"), RULES, catalogue).used == 3


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda root: None, r"does not exist"),
        (lambda root: root.mkdir(), r"dataset 'set': there are no files in .*data; put images there"),
        (lambda root: (root.mkdir(), (root / "a.jpg").write_bytes(b"<html>"), (root / "b.md").write_bytes(b"x")),
         r"dataset 'set': all 2 files in .*data are left out \(1 unreadable, 1 not an image\), such as a\.jpg: unreadable: this is a web"),
    ],
)  # fmt: skip
def test_nothing_to_train_on_is_one_sentence(tmp_path: Path, catalogue: Catalogue, prepare: object, sentence: str) -> None:
    prepare(tmp_path / "data")  # type: ignore[operator]
    with pytest.raises(DataError, match=sentence):
        scan(LocalSource(tmp_path / "data"), BY_NAME, catalogue)


def test_a_failing_disk_ends_the_scan_instead_of_leaving_images_out(catalogue: Catalogue) -> None:
    class Failing(MemoryBackend):
        def open(self, key: str) -> BinaryIO:
            if key == "b.png":
                raise OSError(errno.EIO, "Input/output error")
            return super().open(key)

    files = {f"{name}.png": picture() for name in "abc"}
    with pytest.raises(StorageError, match=r"memory: b\.png could not be read: Input/output error"):
        scan(Failing(files), BY_NAME, catalogue)
    assert scan(MemoryBackend(files), BY_NAME, catalogue).used == 3


def test_a_stop_is_noticed_between_files_and_what_was_read_is_kept(catalogue: Catalogue) -> None:
    store = Watched({f"{index:04}.png": picture() for index in range(1000)})
    seen: list[tuple[int, int]] = []

    def stop() -> bool:
        return len(store.opened) > 200

    with pytest.raises(Interrupted):
        scan(store, BY_NAME, catalogue, ScanOptions(1, lambda *state: seen.append(state), stop))
    assert 200 < len(store.opened) < 400
    assert seen[-1] == (len(store.opened), 1000)
    already = set(store.opened)
    assert set(store.reopened(BY_NAME, catalogue)) == set(store._files) - already
    assert catalogue.totals("set")[0] == 1000


def test_a_stop_while_images_are_judged_leaves_the_verdicts_as_they_were(catalogue: Catalogue) -> None:
    store = MemoryBackend({"a_cat.png": picture(), "a_cat.txt": b"the cat"})
    scan(store, RULES, catalogue)
    with pytest.raises(Interrupted):
        scan(store, BY_NAME, catalogue, ScanOptions(should_stop=lambda: True))
    assert list(catalogue.captions("set")) == ["the cat"]
    scan(store, BY_NAME, catalogue)
    assert list(catalogue.captions("set")) == ["a cat"]


def test_a_scan_killed_at_any_moment_is_finished_by_the_next(tmp_path: Path) -> None:
    data, database = tmp_path / "data", tmp_path / "catalogue.sqlite"
    messy_folder(data)
    script = (
        "import sys, time\nfrom helpers.data.catalogue import scan as module\nfrom tests.data.test_scan import RULES\n"
        "from helpers.data.catalogue.catalogue import Catalogue\nfrom helpers.storage.local import LocalSource\n"
        "really, module._BLOCK = module._facts, 4\n"
        "def slowly(*arguments):\n    print('.', flush=True)\n    time.sleep(0.05)\n    return really(*arguments)\n"
        "module._facts = slowly\n"
        "module.scan(LocalSource(sys.argv[1]), RULES, Catalogue(sys.argv[2]), module.ScanOptions(threads=1))\n"
    )
    with Catalogue(database) as catalogue:  # an older, finished scan, so that there is a verdict to go stale
        (data / "late").mkdir()
        scan(LocalSource(data), RULES, catalogue)
        for index in range(30):
            (data / "late" / f"{index}.png").write_bytes(picture())
            (data / "late" / f"{index}.txt").write_text("late")
    for files in (1, 9, 23):
        scanner = subprocess.Popen([sys.executable, "-c", script, str(data), str(database)], stdout=subprocess.PIPE)
        assert scanner.stdout is not None
        for _ in range(files):
            assert scanner.stdout.readline() == b".\n"
        scanner.kill()
        scanner.wait()
        scanner.stdout.close()
    with Catalogue(database) as catalogue:
        result = scan(LocalSource(data), RULES, catalogue)
        assert (result.found, result.used) == (53, 50)
        assert 0 < result.opened < 60, "what was read before the kills is kept"
        assert scan(LocalSource(data), RULES, catalogue).opened == 1, "only the dead link is tried again"


def test_a_catalogue_that_is_damaged_or_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"this is not a database" * 100)
    with pytest.raises(DataError, match=r"c\.sqlite is damaged or no SQLite database .*move it away"):
        Catalogue(tmp_path / "c.sqlite")
    other = sqlite3.connect(tmp_path / "d.sqlite")
    other.execute("CREATE TABLE precious (x)")
    other.commit()
    other.close()
    with pytest.raises(DataError, match=r"d\.sqlite is not a catalogue of this version"):
        Catalogue(tmp_path / "d.sqlite")


def test_a_catalogue_that_cannot_be_written_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="could not be opened"):
        Catalogue(tmp_path / "file" / "catalogue.sqlite")


def test_a_full_disk_while_scanning_is_a_sentence_and_the_next_scan_goes_on(tmp_path: Path) -> None:
    store = MemoryBackend({f"{index:05}.png": picture() for index in range(3000)})
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        with catalogue._database.connection() as connection:
            connection.execute("PRAGMA max_page_count = 60")  # SQLite then reports what it reports for a full disk
        with pytest.raises(StorageError, match=r"catalogue\.sqlite could not be read or written: .*full"):
            scan(store, BY_NAME, catalogue)
        with catalogue._database.connection() as connection:
            connection.execute("PRAGMA max_page_count = 1000000")
        assert scan(store, BY_NAME, catalogue).used == 3000


def test_headers_of_more_than_a_thousand_files_a_second_are_scanned_by_one_core(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = picture(768, 512, "JPEG")
    for index in range(1000):
        (tmp_path / "data" / f"{index}.jpg").write_bytes(data)

    def seconds(attempt: int) -> float:
        with Catalogue(tmp_path / f"{attempt}.sqlite") as catalogue:
            started = time.process_time()
            assert scan(LocalSource(tmp_path / "data"), BY_NAME, catalogue).used == 1000
            return time.process_time() - started

    assert any(seconds(attempt) < 1000 / 1500 for attempt in range(8))  # on a slow core too; benchmarks/header_scan.py has the gate


class Waiting(MemoryBackend):
    """Each file takes a while to answer, and it is remembered which threads asked."""

    def __init__(self, files: dict[str, bytes], seconds: float) -> None:
        super().__init__(files)
        self.seconds = seconds
        self.threads: set[int] = set()

    def open(self, key: str) -> BinaryIO:
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return super().open(key)


def test_many_threads_read_where_files_take_long_to_answer_and_few_where_they_do_not(tmp_path: Path) -> None:
    files = {f"{index:04}.png": picture(30 + index % 50) for index in range(1500)}
    files["0700.png"] = files["0020.png"] = b"<html>"

    def scanned(attempt: int, seconds: float) -> tuple[int, list[object]]:
        store = Waiting(files, seconds)
        with Catalogue(tmp_path / f"{attempt}.sqlite") as catalogue:
            scan(store, BY_NAME, catalogue)
            told: list[object] = [reasons(catalogue), [catalogue.sample(row) for row in catalogue.columns("set").rows.tolist()]]
        return len(store.threads), told

    far, found = scanned(0, 0.01)
    near = [scanned(attempt, 0) for attempt in (1, 2, 3)]
    assert far > 16
    assert min(threads for threads, _ in near) <= 3  # the best of three: beside other programs a thread waits for its core too
    assert all(told == found for _, told in near)


def test_left_out_files_are_records(catalogue: Catalogue) -> None:
    scan(MemoryBackend({"a.png": picture(), "b.md": b""}), BY_NAME, catalogue)
    assert list(catalogue.left_out("set")) == [LeftOut("b.md", "not an image: its name ends in .md")]


def test_files_of_system_folders_are_not_used_and_the_folders_are_counted(catalogue: Catalogue, tmp_path: Path) -> None:
    for folder in ("", ".Trash-1000/files", "#recycle", "$Recycle.Bin", ".stversions/.deep", "sub"):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / folder / "p.png").write_bytes(picture())
    result = scan(LocalSource(tmp_path / "data"), BY_NAME, catalogue)
    assert list(catalogue.keys("set")) == ["p.png", "sub/p.png"]
    assert (result.found, result.used, result.left_out, result.skipped_folders) == (2, 2, 0, 4)
    assert catalogue.skipped_folders("set") == ["#recycle/", "$Recycle.Bin/", ".Trash-1000/", ".stversions/"]
    assert summary(result) == "set: 2 files = 2 used + 0 left out · 4 system folders not read"
    again = scan(LocalSource(tmp_path / "data"), BY_NAME, catalogue)
    assert (again.opened, again.new, again.skipped_folders) == (0, 0, 4)
    (tmp_path / "data" / "#recycle" / "p.png").unlink()
    (tmp_path / "data" / "#recycle").rmdir()
    assert scan(LocalSource(tmp_path / "data"), BY_NAME, catalogue).skipped_folders == 3


def test_a_dataset_of_nothing_but_system_folders_says_so(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "data" / ".Trash-1000").mkdir(parents=True)
    (tmp_path / "data" / ".Trash-1000" / "p.png").write_bytes(picture())
    with pytest.raises(DataError, match=r"no files in .*data outside of system folders, such as \.Trash-1000/, which are not read"):
        scan(LocalSource(tmp_path / "data"), BY_NAME, catalogue)


def exchange(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@pytest.mark.parametrize("how", ["rename", "write", "copy"])
def test_a_file_of_the_same_size_and_time_is_read_again_after_a_change(catalogue: Catalogue, tmp_path: Path, how: str) -> None:
    """As unpacked archives, `cp -a` and container images leave files: all of one time."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in (("a", (40, 30)), ("b", (30, 40))):
        (folder / f"{name}.bmp").write_bytes(picture(*size, format="BMP").ljust(5000, b"\0"))
        (folder / f"{name}.txt").write_text(f"caption {name}")

    def same_time() -> None:
        for path in folder.iterdir():
            os.utime(path, ns=(0, 1_700_000_000_000_000_000))

    same_time()
    scan(LocalSource(folder), RULES, catalogue)
    catalogue.set_content((row, str(row)) for row in catalogue.columns("set").rows.tolist())
    if how == "rename":
        exchange(folder / "a.bmp", folder / "b.bmp")
        exchange(folder / "a.txt", folder / "b.txt")
    elif how == "write":
        for ending in (".bmp", ".txt"):
            one, other = (folder / f"a{ending}").read_bytes(), (folder / f"b{ending}").read_bytes()
            (folder / f"a{ending}").write_bytes(other)
            (folder / f"b{ending}").write_bytes(one)
    else:
        subprocess.run(["cp", "-a", folder, tmp_path / "copy"], check=True)
        shutil.rmtree(folder)
        (tmp_path / "copy").rename(folder)
        exchange(folder / "a.bmp", folder / "b.bmp")
        exchange(folder / "a.txt", folder / "b.txt")
    same_time()
    result = scan(LocalSource(folder), RULES, catalogue)
    found = [catalogue.sample(row) for row in catalogue.columns("set").rows.tolist()]
    assert [(sample.key, sample.size, sample.captions) for sample in found] == [
        ("a.bmp", Size(30, 40), ("caption b",)),
        ("b.bmp", Size(40, 30), ("caption a",)),
    ]
    assert list(catalogue.contents("set")) == [None, None]  # so that the bytes are hashed again
    assert (result.changed, scan(LocalSource(folder), RULES, catalogue).changed) == (4, 0)


@pytest.mark.parametrize(("image", "caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_caption_whose_name_is_in_another_unicode_form_belongs_to_its_image(catalogue: Catalogue, image: str, caption: str) -> None:
    def spelled(form: str, name: str) -> str:
        return unicodedata.normalize(form, name)

    files = {spelled(image, "sub/décor.png"): picture(), "ok.png": picture(), "ok.txt": b"ok"}
    files[spelled(caption, "sub/décor.txt")] = "한국어".encode()
    result = scan(MemoryBackend(files), RULES, catalogue)
    assert (result.found, result.used) == (2, 2)
    assert set(catalogue.captions("set")) == {"한국어", "ok"}
    exact = spelled(image, "sub/décor.txt")
    scan(MemoryBackend({**files, exact: b"its own"}), RULES, catalogue)
    assert set(catalogue.captions("set")) == {"its own", "ok"}
    assert reasons(catalogue) == {spelled(caption, "sub/décor.txt"): "caption without an image: no image has this name"}
    scan(MemoryBackend(files), RULES, catalogue)
    assert set(catalogue.captions("set")) == {"한국어", "ok"}


def test_where_everything_is_left_out_the_example_is_an_image_and_its_most_common_reason(catalogue: Catalogue) -> None:
    files = {f"{number}.png": picture() for number in range(3)} | {f"{number}.md": b"x" for number in range(9)} | {"0_bad.png": b"x"}
    with pytest.raises(DataError, match=r"are left out \(9 not an image, 3 no caption, 1 unreadable\), such as 0\.png: no caption"):
        scan(MemoryBackend(files), RULES, catalogue)


def test_caption_files_of_several_endings_and_json_are_read(catalogue: Catalogue) -> None:
    tags = json.dumps({"prompt": "from json", "tags": ["a", "b"]}).encode()
    files = {name: picture() for name in ("a.png", "b.png", "c.png")}
    files |= {"a.caption": b"first", "a.txt": b"second", "b.txt": b"of b", "a.json": tags, "b.json": b"[1]", "c.json": b"{"}
    backend = MemoryBackend(files)
    with pytest.raises(DataError, match=r"files with the names of images end in \.json \(3\): caption_strategy json reads them") as caught:
        scan(backend, replace(RULES, captions=CaptionRule("textfile", extensions=(".tags",))), catalogue)
    assert "a.tags is missing" in str(caught.value)
    both = replace(RULES, captions=CaptionRule("textfile", extensions=(".caption", ".txt"), fallback="dog"))
    assert scan(backend, both, catalogue).used == 3  # the endings changed: files are sorted anew
    assert list(catalogue.captions_by_image("set")) == ['["first"]', '["of b"]', '["dog"]']
    in_json = CaptionRule("json", extensions=(".json",), json_key="prompt")
    scan(backend, replace(RULES, captions=in_json), catalogue)
    assert list(catalogue.captions("set")) == ["from json"]
    assert reasons(catalogue)["b.png"].startswith("no caption: b.json has no key 'prompt'")
    assert reasons(catalogue)["c.png"].startswith("caption is not JSON: c.json")
    with pytest.raises(DataError, match="caption is a list: 'tags' of a.json; set multiple_captions"):
        scan(backend, replace(RULES, captions=replace(in_json, json_key="tags")), catalogue)
    scan(backend, replace(RULES, captions=replace(in_json, json_key="tags", multiple=True)), catalogue)
    assert list(catalogue.captions("set")) == ["a", "b"]


def test_captions_in_a_folder_of_their_own(catalogue: Catalogue, tmp_path: Path) -> None:
    images = tmp_path / "images"
    texts = {
        "sub/a.png": "",
        "b.png": "",
        "b.txt": "stray",
        "captions/sub/a.txt": "of a",
        "captions/b.txt": "of b",
        "captions/notes.md": "",
    }
    for name, text in texts.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(picture() if name.endswith("png") else text.encode())
    (images / "c.png").write_bytes(picture())
    (images / "c.txt").write_text("beside")
    source = WithCaptionFolder(images, images / "captions", (".txt",))
    assert scan(source, RULES, catalogue).used == 2
    assert list(catalogue.captions("set")) == ["of a", "of b"]
    assert reasons(catalogue).keys() == {"c.png", "c.txt"}
    assert reasons(catalogue)["c.txt"] == f"caption beside the image: captions are read from {images / 'captions'}"


def test_images_in_two_datasets_are_told_with_the_remedy(catalogue: Catalogue, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "reg/c.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(picture())
    (tmp_path / "link").symlink_to(tmp_path / "data" / "reg")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "far").symlink_to(tmp_path / "data" / "reg")

    def lines(*sets: DatasetConfig) -> list[str]:
        for each in sets:
            scan(open_source(each), replace(BY_NAME, dataset=each.id), catalogue)
        return overlap_lines(sets, catalogue)

    def at(name: str, folder: str, **changed: Any) -> DatasetConfig:
        return dataset(tmp_path / folder, tmp_path, id=name, **changed)

    data, reg = at("sks", "data"), at("class", "data/reg")
    (line,) = lines(data, reg)
    assert line.startswith("1 of 3 images of sks are also in class") and f"move {tmp_path}/data/reg out of" in line
    assert lines(reg, data) == [line]
    (line,) = lines(data, at("class", "link"))
    assert "1 of 3 images of sks are also in class" in line
    (line,) = lines(data, at("far", "other"))
    assert "links lead to the same files" in line
    (line,) = lines(data, at("edges", "data/reg", dataset_type="conditioning"))
    assert "trained as images and as conditioning" in line
    (line,) = lines(data, at("again", "data"))
    assert line.startswith("sks and again both read")
    assert lines(data, at("larger", "data", resolution=128)) == []
