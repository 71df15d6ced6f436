"""A full disk ends the run in a sentence, or the run waits for space and then ends in the same bytes."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.data.cache.cache import Cache, Writer, record_key
from helpers.errors import StorageError
from helpers.protocols import StepResult
from helpers.reporting.records import METRICS, Records
from helpers.storage import full_disk
from helpers.storage.atomic import write_file
from helpers.storage.full_disk import is_full, until_written, wait_for_space
from tests.data.test_cache import record


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A run that waits for space; put True into the list to ask it to stop."""
    asked: list[bool] = []
    monkeypatch.setattr(full_disk, "TRY_SECONDS", 0.02)
    monkeypatch.setattr(full_disk, "LOOK_SECONDS", 0.001)
    wait_for_space(lambda: bool(asked))
    yield asked
    wait_for_space(None)


class FullFor:
    """Stands before a call of `os`: it fails as on a full disk, the first few times."""

    def __init__(self, name: str, times: int, patch: pytest.MonkeyPatch) -> None:
        self.call, self.times = getattr(os, name), times
        patch.setattr(os, name, self)

    def __call__(self, *arguments: object) -> object:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.call(*arguments)


def test_files_and_shards_are_written_once_there_is_space(tmp_path: Path, waits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    FullFor("fsync", 3, monkeypatch)
    write_file(tmp_path / "image.png", b"pixels")
    assert (tmp_path / "image.png").read_bytes() == b"pixels"
    FullFor("replace", 2, monkeypatch)
    cache = Cache(tmp_path / "cache")
    with Writer(cache) as writer:
        writer.add(record_key("a"), record(1))
    assert cache.get(record_key("a")) is not None
    cache.close()
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def test_a_line_that_was_half_written_is_completed(tmp_path: Path, waits: list[bool]) -> None:
    records = Records(tmp_path, 0, record_samples=False)
    stream, written = records._metrics, iter([5, None, None])

    class FullAfterFiveBytes:
        name = stream.name

        def write(self, data: bytes) -> int:
            if (count := next(written, len(data))) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return stream.write(data[:count])

    records._metrics = FullAfterFiveBytes()  # type: ignore[assignment]
    for step in (1, 2):
        records.stepped(StepResult(step, 0, 0.5, 1e-4, 1.0, 1.0, 0.0, 4))
    records.close()
    again = Records(tmp_path, 2, record_samples=False)
    assert again.notes == [] and (tmp_path / METRICS).read_bytes().count(b"\n") == 2
    again.close()


def test_a_stop_ends_the_waiting_with_the_error(tmp_path: Path, waits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    FullFor("fsync", 10**9, monkeypatch)
    threading.Timer(0.1, waits.append, [True]).start()
    with pytest.raises(StorageError, match=r"image.png could not be written: No space left on device"):
        write_file(tmp_path / "image.png", b"pixels")
    assert not list(tmp_path.iterdir())


def test_other_errors_and_runs_that_do_not_wait_end_at_once(tmp_path: Path, waits: list[bool]) -> None:
    def fails(number: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match="Input/output error"):
        until_written(tmp_path / "x", lambda: fails(errno.EIO))
    wait_for_space(None)
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        until_written(tmp_path / "x", lambda: fails(errno.ENOSPC))
    assert time.monotonic() - began < 1


def test_what_libraries_say_of_a_full_disk_is_understood() -> None:
    for text in ("I/O error: No space left on device (os error 28)", "Disk quota exceeded (os error 122)", "database or disk is full"):
        assert is_full(StorageError(f"x could not be written: {text}"))
    wrapped = StorageError("x could not be written")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert is_full(wrapped) and not is_full(StorageError("x could not be written: Input/output error"))
