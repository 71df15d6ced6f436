"""A run whose loss is no longer finite: nothing diverged is exported, and the sentence names a checkpoint from before."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from helpers.data.base.sample import Sample, Size
from helpers.errors import TrainingError
from helpers.protocols import StepResult
from helpers.reporting.console import Console
from helpers.reporting.records import METRICS, Records
from helpers.reporting.trackers import Trackers
from helpers.training.state import TrainState
from helpers.training.steps import refuse_export, stop_if_diverged
from tests.faults.conftest import Miniature
from tests.training.test_checkpoints import checkpointer, save, save_unproved, there

SAMPLES = [Sample("cats", "a/tom.png", Size(64, 64), ("a cat",))]
SKIPPED = StepResult(3, 0, None, 1e-4, None, 1.0, 0.0, 4, skipped=True)


def test_a_run_that_ends_diverged_exports_nothing_and_keeps_no_checkpoint_of_it(small: Miniature) -> None:
    with pytest.raises(TrainingError, match=r"not finite in the last 3 steps.*No checkpoint is from before that: start again"):
        small.run(learning_rate=1e30, checkpointing_steps=100)
    assert not [path.name for path in small.output.iterdir() if "lora" in path.name or "checkpoint" in path.name]
    rows = [json.loads(line) for line in (small.output / METRICS).read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False, True, True, True]
    assert all("loss" not in row and "grad_norm" not in row for row in rows[1:])


def test_the_last_good_checkpoint_is_kept_until_a_finite_step_followed_a_newer_one(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=1)
    save(target, 2)
    save_unproved(target, 4)
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(TrainingError, match="Resume with --resume_from_checkpoint=checkpoint-2, the newest with which a step was finite"):
        refuse_export(TrainState(1, step=5, updates=4, skipped_in_a_row=1), "no", target)
    with pytest.raises(TrainingError, match=r"4 steps in a row, the last at step 9 with cats/a/tom.png. .*=checkpoint-2,"):
        stop_if_diverged(TrainState(1, step=9, updates=4, skipped_in_a_row=4), "no", SAMPLES, target)
    with pytest.raises(TrainingError, match="Resume from checkpoint-4, which is from before that"):
        refuse_export(TrainState(1, step=6, updates=5, skipped_in_a_row=1), "no", target)
    target.proved_good()
    assert there(tmp_path) == ["checkpoint-4"]


def test_single_steps_are_lost_to_the_scale_of_fp16_and_to_unreadable_images(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    refuse_export(TrainState(1, step=9, updates=8, skipped_in_a_row=1), "fp16", target)
    refuse_export(TrainState(1, step=9, updates=8), "no", target)
    stop_if_diverged(TrainState(1, step=9, updates=4, skipped_in_a_row=3), "no", SAMPLES, target)
    with pytest.raises(TrainingError, match="--mixed_precision=bf16"):
        refuse_export(TrainState(1, step=9, updates=7, skipped_in_a_row=2), "fp16", target)
    with pytest.raises(TrainingError, match="nothing was learned"):
        refuse_export(TrainState(1, step=1, skipped_in_a_row=1), "fp16", target)


def test_a_skipped_step_is_shown_as_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.started({}, 100)
    console.stepped(SKIPPED)
    said = capsys.readouterr().err
    assert "skipped    step 3: loss not finite · lr 1.00e-04 · grad not finite" in said and "0.0000" not in said


def test_trackers_get_no_number_for_what_is_none(tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []
    trackers = Trackers.__new__(Trackers)
    trackers._trackers = [type("Tracker", (), {"log": staticmethod(lambda metrics, step: logged.append(metrics))})]
    trackers.stepped(SKIPPED)
    assert logged and "train/loss" not in logged[0] and "train/grad_norm" not in logged[0] and "train/learning_rate" in logged[0]


def test_rows_of_skipped_steps_are_json(tmp_path: Path) -> None:
    records = Records(tmp_path, 0, record_samples=False)
    records.stepped(SKIPPED)
    records.close()
    assert json.load(io.BytesIO((tmp_path / METRICS).read_bytes()))["skipped"] is True
