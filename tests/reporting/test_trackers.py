"""What TensorBoard is told, read back by TensorBoard itself."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.config.options import ReportingOptions
from helpers.protocols import StepResult, ValidationImage
from helpers.reporting.trackers import Trackers


def trackers(folder: Path, resumed_at: int = 0) -> Trackers:
    return Trackers(ReportingOptions(report_to=("tensorboard",), tracker_run_name="mine"), folder, {}, resumed_at)


def result(step: int, loss: float) -> StepResult:
    return StepResult(step, 0, loss, learning_rate=1e-4, grad_norm=1.0, seconds=0.1, data_seconds=0.0, samples=4)


def told(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "logs" / "mine")).Reload()


def test_curves_and_pictures_are_told_by_step_and_by_names_that_stay(tmp_path: Path) -> None:
    path = tmp_path / "step_2_a_fox_3x2.png"
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(path)
    reporter = trackers(tmp_path)
    for step in (1, 2):
        reporter.stepped(result(step, 0.5 / step))
    reporter.validated(2, [ValidationImage("a_fox_3x2", path)])
    reporter.close()

    events = told(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [event.value for event in events.Scalars("train/learning_rate")] == pytest.approx([1e-4, 1e-4])
    assert "train/text_encoder_lr" not in events.Tags()["scalars"]
    [shown] = events.Images("validation/a_fox_3x2")
    assert shown.step == 2
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)).convert("RGB")), pixels)


def test_a_resumed_run_takes_back_what_it_said_of_the_steps_that_are_made_again(tmp_path: Path) -> None:
    for resumed_at, losses in ((0, (1.0, 2.0, 3.0)), (1, (4.0, 5.0))):
        reporter = trackers(tmp_path, resumed_at)
        for step, loss in enumerate(losses, start=resumed_at + 1):
            reporter.stepped(result(step, loss))
        reporter.close()
        time.sleep(1.0)  # the files are read in the order of their names, which begin with the second
    assert [(event.step, event.value) for event in told(tmp_path).Scalars("train/loss")] == [(1, 1.0), (2, 4.0), (3, 5.0)]
