"""Training images are only ever read, and a run writes into its OUTPUT_DIR alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.harness import Ended, Trainer, same_weights
from tests.runs.evidence import can_write_into, make_read_only, refusal, run_obeying_modes, snapshot


@pytest.mark.slow
def test_a_read_only_data_folder_trains_to_the_same_bytes_and_nothing_else_is_written(
    trainer: Trainer, finished: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache folders are the default ones."""
    home, trainer.images = tmp_path / "home", shutil.copytree(trainer.images, tmp_path / "images")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    make_read_only(trainer.images)
    assert not can_write_into(trainer.images)
    before = snapshot(trainer.images)
    trainer.dataloader()
    beside, model = set(os.listdir(tmp_path)), snapshot(trainer.model)

    ended = run_obeying_modes(trainer)

    assert ended.code == 0, ended.printed
    assert ended.losses == finished.losses
    assert same_weights(finished, ended)
    assert snapshot(trainer.images) == before
    assert snapshot(trainer.model) == model
    assert set(os.listdir(tmp_path)) - beside == {"out", "here"}
    assert os.listdir(tmp_path / "here") == []
    # Matplotlib keeps its list of the machine's fonts in the user's cache folder.
    assert {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()} <= {(".cache", "matplotlib")}


@pytest.mark.slow
def test_images_below_the_output_folder_stay_as_they_are(trainer: Trainer) -> None:
    trainer.images = shutil.copytree(trainer.images, trainer.folder / "out" / "images")
    before = snapshot(trainer.images)
    trainer.finish(max_train_steps=2)
    assert snapshot(trainer.images) == before


@pytest.mark.slow
def test_an_output_folder_that_cannot_be_written_to_is_refused(trainer: Trainer) -> None:
    output = trainer.folder / "out"
    output.mkdir()
    output.chmod(0o555)
    said = refusal(run_obeying_modes(trainer))
    assert f"--output_dir={output} is not writable" in said
    assert list(output.iterdir()) == []
