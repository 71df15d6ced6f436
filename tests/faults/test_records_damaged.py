"""metrics.jsonl is data: whatever stands in it, a run starts, and says what is unreadable or missing."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from helpers.errors import StorageError
from helpers.protocols import StepResult
from helpers.reporting.loss_curve import write_loss_curve
from helpers.reporting.records import METRICS, Records, cut_back
from tests.faults.conftest import Miniature


def line(step: object) -> bytes:
    return json.dumps({"step": step, "loss": 0.5}).encode() + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 4096 + b"\n",
        b"\xff\xfe\n",
        b"{\n",
        b"[]\n",
        b'{"loss": 1}\n',
        line(True),
        line("3"),
        b"[" * 200_000 + b"\n",
        b"1" * 5000 + b"\n",
    ],
)
def test_an_unreadable_line_is_left_out_and_counted(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(line(1) + damage + line(2) + line(9) + b'{"step": 1')
    records = Records(tmp_path, 3, record_samples=False)
    records.close()
    assert (tmp_path / METRICS).read_bytes() == line(1) + line(2)
    assert records.notes == [
        f"{tmp_path / METRICS}: unreadable lines, removed: 1",
        f"{tmp_path / METRICS} has no line for 1 of the 3 steps up to here",
    ]
    (tmp_path / METRICS).write_bytes(damage)
    assert write_loss_curve(tmp_path) is None


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / METRICS).open("wb") as stream:
        stream.write(line(1))
        stream.truncate(2**26)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + line(2))
    tracemalloc.start()
    kept = cut_back(tmp_path / METRICS, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (kept.steps, kept.unreadable) == (2, 1) and peak < 2**23
    assert (tmp_path / METRICS).read_bytes() == line(1) + line(2)


def test_lines_are_durable_before_the_checkpoint_of_their_step(small: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(file: int) -> None:
        happened.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")
        fsync(file)

    def noted_rename(source: Path, target: Path) -> None:
        happened.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    small.run(max_train_steps=1, record_samples=True)
    at = happened.index("rename checkpoint-1")
    assert {"fsync metrics.jsonl", "fsync samples.jsonl"} <= set(happened[:at])


def test_a_disk_that_cannot_make_them_durable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path, 0, record_samples=False)
    records.stepped(StepResult(1, 0, 0.5, 1e-4, 1.0, 1.0, 0.0, 4))
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError, match="metrics.jsonl could not be written: Input/output error"):
        records.saving(1)
