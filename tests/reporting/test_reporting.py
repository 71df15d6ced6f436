"""What a run writes down and shows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from helpers.protocols import StepResult
from helpers.reporting import Reporters
from helpers.reporting.console import Console
from helpers.reporting.contact_sheet import CELL, write_contact_sheet
from helpers.reporting.loss_curve import running_mean, write_loss_curve
from helpers.reporting.records import Records, cut_back


def result(step: int, loss: float = 0.5) -> StepResult:
    return StepResult(step, 0, loss, 1e-4, 1.0, 0.1, 0.001, 4)


def test_a_resumed_run_removes_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    """Including a line that a kill left incomplete."""
    first = Records(tmp_path, 0, record_samples=True)
    for step in range(1, 6):
        first.stepped(result(step))
        first.sampled([{"step": step, "place": place} for place in range(2)])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    again = Records(tmp_path, 3, record_samples=True)
    again.stepped(result(4, 0.25))
    again.close()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["loss"] == 0.25
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [1, 1, 2, 2, 3, 3]


def test_the_learning_rate_of_trained_text_encoders_is_recorded_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, console = Records(tmp_path, 0, record_samples=False), Console()
    console.started({}, 2)
    for each in (result(1), dataclasses.replace(result(2), text_encoder_lr=5e-5)):
        records.stepped(each)
        console.stepped(each)
    records.close()
    without, with_text = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert with_text["text_encoder_lr"] == 5e-5 and "text_encoder_lr" not in without
    first, last = capsys.readouterr().err.splitlines()
    assert "lr 1.00e-04 · grad" in first and "lr 1.00e-04 (text 5.00e-05) · grad" in last


def test_cutting_back_a_file_that_fits_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    cut_back(path, 2)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_numbers_that_json_does_not_know_are_never_written(tmp_path: Path) -> None:
    records = Records(tmp_path, 0, record_samples=False)
    with pytest.raises(ValueError):
        records.stepped(result(1, float("nan")))


def test_contact_sheet_has_a_row_for_each_prompt_and_a_column_for_each_step(tmp_path: Path) -> None:
    for step in (0, 10, 20):
        for name, colour in (("unconditional", "red"), ("a_cat", "blue")):
            Image.new("RGB", (64, 32), colour).save(tmp_path / f"step_{step}_{name}_64x32.png")
    path = write_contact_sheet(tmp_path)
    assert path is not None
    with Image.open(path) as sheet:
        assert sheet.width > 3 * CELL
        assert sheet.height > 2 * CELL
        pixels = list(sheet.getdata())
    # Six images of 192 x 96 pixels, half of them red.
    assert pixels.count((255, 0, 0)) == pixels.count((0, 0, 255)) == 3 * CELL * CELL // 2


def test_a_long_run_still_fits_on_one_sheet(tmp_path: Path) -> None:
    for step in range(0, 4000, 100):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"step_{step}_x_64x64.png")
    path = write_contact_sheet(tmp_path)
    assert path is not None
    with Image.open(path) as sheet:
        assert sheet.width < 13 * (CELL + 8)


def test_no_images_no_sheet_and_no_steps_no_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert write_contact_sheet(tmp_path) is None
    assert write_loss_curve(tmp_path) is None


def test_loss_curve_is_drawn(tmp_path: Path) -> None:
    records = Records(tmp_path, 0, record_samples=False)
    for step in range(1, 50):
        records.stepped(result(step, 1 / step))
    path = write_loss_curve(tmp_path)
    assert path is not None
    with Image.open(path) as image:
        assert len(set(image.convert("RGB").getdata())) > 50


def test_running_mean() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_console_prints_rate_and_time_left_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.reporting.console.PLAIN_EVERY_S", 0.0)
    console = Console()
    console.started({}, 10)
    console.stepped(result(4))
    with Reporters(console).progress("encode", 10, "images") as advance:
        advance(5)
    said = capsys.readouterr().err
    assert "step 4 of 10" in said
    assert "0.10 s/step · 1 s left" in said
    assert "5 of 10" in said
    assert "images/s" in said
