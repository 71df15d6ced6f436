from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.errors import DataError
from helpers.storage import local
from helpers.storage.backend import SourceBackend
from helpers.storage.local import LocalSource
from tests.runs.evidence import obey_modes
from tests.storage.memory import MemoryBackend


def keys(source: SourceBackend) -> list[str]:
    return [entry.key for entry in source.list() if not entry.is_folder]


@pytest.fixture(params=["folder", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> SourceBackend:
    """A source with two files, `a.bin` and `b/two.bin`; that of the tests behaves as the real one does."""
    files = {"a.bin": b"one", "b/two.bin": b"22"}
    if request.param == "memory":
        return MemoryBackend(files)
    for key, data in files.items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(data)
    return LocalSource(tmp_path)


def test_a_source_lists_its_files_and_gives_their_bytes(source: SourceBackend) -> None:
    assert {entry.key: entry.size for entry in source.list()} == {"a.bin": 3, "b/two.bin": 2}
    assert source.read("a.bin") == b"one"
    with source.open("b/two.bin") as stream:
        assert stream.read(1) == b"2"
    with pytest.raises(FileNotFoundError):
        source.read("c.bin")


def test_a_source_has_no_way_to_write_or_delete() -> None:
    assert not {"write", "delete"} & set(dir(LocalSource))


def test_listing_is_recursive_and_in_an_order_of_names_alone(tmp_path: Path) -> None:
    for key in ("b.jpg", "a/2.jpg", "a/1.jpg", "a/deep/x.png", "A.JPG"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"12345")
    assert keys(LocalSource(tmp_path)) == ["A.JPG", "b.jpg", "a/1.jpg", "a/2.jpg", "a/deep/x.png"]
    entry = next(LocalSource(tmp_path).list())
    assert (entry.size, entry.modified_ns) == (5, (tmp_path / "A.JPG").stat().st_mtime_ns)


def test_links_are_followed_out_of_the_root_and_loops_end(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "far.jpg").write_bytes(b"")
    (outside / "back").symlink_to(root)
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "near.jpg").write_bytes(b"")
    (root / "a_link").symlink_to(outside)
    (root / "again").symlink_to(outside)
    (root / "sub" / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    assert keys(LocalSource(root)) == ["self", "sub/near.jpg", "a_link/far.jpg"]


def test_the_real_folder_wins_over_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "x.jpg").write_bytes(b"")
    (tmp_path / "a").symlink_to("z")
    assert keys(LocalSource(tmp_path)) == ["z/x.jpg"]


# Linux desktops, Synology, QNAP, Windows, Syncthing, Dropbox, Picasa, Resilio, ZFS, macOS, Jupyter, Git, chkdsk: in any letter case.
SYSTEM_FOLDERS = (
    *("$RECYCLE.BIN", "$Recycle.Bin", "#recycle", "#Recycle", "@Recycle", "@eaDir", "@EADIR", ".@__thumb", ".Trash-1000", ".Trashes"),
    *(".stversions", ".dropbox.cache", ".picasaoriginals", ".sync", ".zfs", ".snapshots", "#snapshot", ".ipynb_checkpoints", ".git"),
    *("__MACOSX", "System Volume Information", "SYSTEM VOLUME INFORMATION", "lost+found", "FOUND.000", "RECYCLER", "x.png/.hidden"),
)


def test_system_folders_folders_named_like_images_and_pipes_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    (tmp_path / "x.png" / "inside.jpg").write_bytes(b"")
    for folder in SYSTEM_FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "inside.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has to be short
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
        assert keys(LocalSource(tmp_path)) == ["x.png/inside.jpg"]
    skipped = [entry.key for entry in LocalSource(tmp_path).list() if entry.is_folder]
    assert skipped == sorted(f"{folder}/" for folder in SYSTEM_FOLDERS if "/" not in folder) + ["x.png/.hidden/"]


@pytest.mark.parametrize("name", ["with space.jpg", "new\nline.jpg", "quote'\".jpg", "ünï☃.jpg", "-dash.jpg", "x" * 251 + ".jpg", "*.jpg"])
def test_odd_names_are_listed_and_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"ok")
    (key,) = keys(LocalSource(tmp_path))
    assert LocalSource(tmp_path).read(key) == b"ok"


def test_a_name_that_is_not_utf8_is_listed_and_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"ok")
    (key,) = keys(LocalSource(tmp_path))
    assert os.fsencode(key) == b"caf\xe9.jpg"
    assert LocalSource(tmp_path).read(key) == b"ok"


@pytest.mark.parametrize("key", ["../secret", "a/../../secret", "/etc/passwd", "", "nul\0"])
def test_keys_that_would_leave_the_root_are_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "root" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="is not the name of a file inside"):
        LocalSource(tmp_path / "root").read(key)


def test_a_missing_folder_and_a_file_in_its_place_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        list(LocalSource(tmp_path / "nowhere").list())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file is not a folder"):
        list(LocalSource(tmp_path / "file").list())


def test_a_file_that_vanishes_while_its_folder_is_listed_is_not_there(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"")
    listed = LocalSource(tmp_path).list()
    first = next(listed)
    (tmp_path / "b.jpg").unlink()
    assert [first.key, *(entry.key for entry in listed)] == ["a.jpg", "c.jpg"]


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_that_may_not_be_read_or_not_be_entered_is_named(tmp_path: Path, mode: int) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "x.jpg").write_bytes(b"")
    script = "import sys; from helpers.storage.local import LocalSource; list(LocalSource(sys.argv[1]).list())"
    (tmp_path / "closed").chmod(mode)
    try:
        ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], preexec_fn=obey_modes, capture_output=True, text=True)
    finally:
        (tmp_path / "closed").chmod(0o755)
    told = f"DataError: {tmp_path / 'closed'} cannot be listed: Permission denied. You need permission to read and enter"
    assert told in ended.stderr


def test_a_system_folder_that_may_not_be_read_stops_nothing(tmp_path: Path) -> None:
    """As the recycle bin of another user on a shared disk."""
    (tmp_path / ".Trash-1001").mkdir(mode=0o000)
    (tmp_path / "a.jpg").write_bytes(b"")
    script = "import sys; from helpers.storage.local import LocalSource; print([e.key for e in LocalSource(sys.argv[1]).list()])"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], preexec_fn=obey_modes, capture_output=True, text=True)
    assert ended.stdout == "['.Trash-1001/', 'a.jpg']\n"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_errors_that_pass_are_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    (tmp_path / "x.jpg").write_bytes(b"ok")
    really, tries = Path.open, []

    def flaky(path: Path, *args: object) -> object:
        tries.append(path)
        if len(tries) <= 2:
            raise OSError(code, os.strerror(code))
        return really(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "_RETRY_AFTER_SECONDS", (0, 0, 0))
    monkeypatch.setattr(Path, "open", flaky)
    with LocalSource(tmp_path).open("x.jpg") as stream:
        assert stream.read() == b"ok"
    assert len(tries) == 3


def test_errors_that_stay_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(local, "_RETRY_AFTER_SECONDS", (0, 0, 0))
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match="Input/output error"):
        LocalSource(tmp_path).open("x.jpg")
