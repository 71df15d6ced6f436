from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.errors import StorageError
from helpers.storage import atomic
from helpers.storage.atomic import atomic_folder, remove_leftovers, verify_manifest, write_file, write_json, write_manifest


def fail_with(code: int):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_file(path, b"old")
    write_json(path, {"step": 3, "name": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"step": 3, "name": "ü"}
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_refused_write_says_why_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    path = tmp_path / "state.json"
    write_file(path, b"old")
    monkeypatch.setattr(atomic.os, call, fail_with(code))
    with pytest.raises(StorageError, match=re.escape(f"{path} could not be written: {os.strerror(code)}")):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_json_that_other_programs_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "checkpoint-5"
    for content in (b"one", b"two"):
        with atomic_folder(final) as folder:
            (folder / "unet").mkdir()
            (folder / "unet" / "weights").write_bytes(content)
            assert folder.parent == final.parent
    assert (final / "unet" / "weights").read_bytes() == b"two"
    assert os.listdir(final.parent) == ["checkpoint-5"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_folder_that_cannot_be_finished_is_not_there_and_the_old_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    final = tmp_path / "checkpoint-5"
    with atomic_folder(final) as folder:
        (folder / "weights").write_bytes(b"old")
    with pytest.raises(StorageError, match="checkpoint-5 could not be written: No space left"), atomic_folder(final) as folder:
        (folder / "weights").write_bytes(b"new")
        monkeypatch.setattr(atomic.os, call, fail_with(errno.ENOSPC))
    assert (final / "weights").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, rename, calls = tmp_path / "pipeline", os.rename, []

    def fail_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with atomic_folder(final) as folder:
        (folder / "weights").write_bytes(b"old")
    monkeypatch.setattr(atomic.os, "rename", fail_second)
    with pytest.raises(StorageError), atomic_folder(final) as folder:
        (folder / "weights").write_bytes(b"new")
    assert (final / "weights").read_bytes() == b"old"


def test_an_error_of_the_caller_passes_unchanged_and_removes_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "checkpoint-5") as folder:
        (folder / "weights").write_bytes(b"half")
        raise KeyError("bug")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_save_leaves_is_no_checkpoint_and_can_be_cleared(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom helpers.storage.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_bytes(b'half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    saver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "checkpoint-5")], stdout=subprocess.PIPE, text=True)
    assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
    saver.kill()
    saver.wait()
    (left,) = tmp_path.iterdir()
    assert not list(tmp_path.glob("checkpoint-*"))
    (tmp_path / ".hidden.of.another").write_bytes(b"")
    assert remove_leftovers(tmp_path) == [left]
    assert os.listdir(tmp_path) == [".hidden.of.another"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    moved = tmp_path / ".checkpoint-5.old.123.0123abcd"
    moved.mkdir()
    (moved / "weights").write_bytes(b"old")
    remove_leftovers(tmp_path)
    assert (tmp_path / "checkpoint-5" / "weights").read_bytes() == b"old"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-5"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "state.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_a_saved_folder_verifies(saved: Path) -> None:
    assert verify_manifest(saved) == []
    assert json.loads((saved / "manifest.json").read_text())["files"].keys() == {"state.json", "unet/weights.safetensors"}


def test_one_flipped_bit_in_any_file_is_named(saved: Path) -> None:
    for name in ("state.json", "unet/weights.safetensors"):
        path = saved / name
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        (problem,) = verify_manifest(saved)
        assert name in problem and "differs" in problem
        path.write_bytes(data)


def test_missing_short_and_foreign_files_are_named(saved: Path) -> None:
    (saved / "state.json").unlink()
    (saved / "unet" / "weights.safetensors").write_bytes(b"short")
    (saved / "more").write_bytes(b"")
    problems = "\n".join(verify_manifest(saved))
    assert "state.json is missing" in problems
    assert "has 5 bytes instead of 10240" in problems
    assert "more is not in manifest.json" in problems


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"state.json": {}}}', b"\xff"])
def test_a_damaged_manifest_is_a_problem_and_not_a_crash(saved: Path, text: bytes) -> None:
    (saved / "manifest.json").write_bytes(text)
    (problem,) = verify_manifest(saved)
    assert "manifest.json cannot be read" in problem


def test_a_folder_without_a_manifest_is_not_a_saved_one(tmp_path: Path) -> None:
    assert verify_manifest(tmp_path) == [f"{tmp_path} has no manifest.json"]
