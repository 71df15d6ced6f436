"""The files SAVE and STOP in OUTPUT_DIR ask a run from outside."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from helpers.errors import Interrupted
from helpers.protocols import StepResult
from helpers.reporting.records import Records
from helpers.setup import outputs
from helpers.storage.atomic import verify_manifest
from helpers.training.request_files import SAVE, STOP, watch
from helpers.training.stopping import StopRequest
from tests.faults.conftest import Miniature


def test_save_and_stop(small: Miniature, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    requests = {2: SAVE, 4: STOP}
    stepped = Records.stepped

    def ask(records: Records, result: StepResult) -> None:
        stepped(records, result)
        if name := requests.pop(result.step, None):
            (small.output / name).touch()
            while (small.output / name).exists():
                time.sleep(0.001)
            time.sleep(0.05)  # between the removal of the file and the request

    monkeypatch.setattr(Records, "stepped", ask)
    monkeypatch.setattr(outputs, "watch", functools.partial(watch, poll_seconds=0.001))
    small.output.mkdir()
    (small.output / SAVE).touch()
    with pytest.raises(Interrupted, match="stopped after step 5 of 8, which is saved"):
        small.run(max_train_steps=8, checkpointing_steps=100)
    assert sorted(path.name for path in small.output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    assert verify_manifest(small.output / "checkpoint-3") == []
    assert f"{small.output / STOP} found: finishing this step, then saving." in capfd.readouterr().err
    (small.output / STOP).touch()
    resumed = small.run(max_train_steps=8, checkpointing_steps=100)
    assert f"removed from an earlier run: STOP in {small.output}" in resumed.printed and len(resumed.losses) == 8


def test_a_request_that_cannot_be_removed_is_none(tmp_path: Path) -> None:
    stop = StopRequest()
    (tmp_path / SAVE).mkdir()
    watch(tmp_path, stop, poll_seconds=0.001)
    time.sleep(0.05)
    assert not stop.take_save_request() and not stop.asked
