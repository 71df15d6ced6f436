"""`--dataset_report`: the data is looked at as a run would, and nothing else happens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.data.thumbnails import PER_DATASET
from tests.data.toys import tree_hash
from tests.runs.conftest import Trainer


@pytest.mark.slow
def test_the_report_needs_no_weights_and_changes_no_picture(trainer: Trainer, tmp_path: Path) -> None:
    without_weights = tmp_path / "model"
    shutil.copytree(trainer.model, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    before = tree_hash(trainer.pictures)
    trainer.wrapper = "train_sdxl.sh"
    ended = trainer.finish(pretrained_model_name_or_path=without_weights, dataset_report=True)
    assert f"{ended.folder / 'dataset_report.html'} to look at" in ended.said.replace("\n" + " " * 11, " ")
    assert tree_hash(trainer.pictures) == before
    [entry] = json.loads((ended.folder / "dataset_report.json").read_text())["datasets"]
    assert entry["used"] == entry["unread"] == entry["captions"]["distinct"] == 14
    page = (ended.folder / "dataset_report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == min(14, PER_DATASET)
    left = {path.name for path in ended.folder.iterdir()} - {".lock"}
    assert left == {"cache", "dataset_report.html", "dataset_report.json"}
    assert not (ended.folder / "cache" / "latents").exists()


@pytest.mark.slow
def test_a_run_trains_the_same_after_a_look_at_its_data(trainer: Trainer) -> None:
    settings = {"max_train_steps": 2, "validation_prompt": None, "validation_disable_unconditional": True}
    alone = trainer.finish("alone", **settings)
    trainer.finish("looked_at", dataset_report=True, **settings)
    assert trainer.finish("looked_at", **settings).losses == alone.losses
    [entry] = json.loads((trainer.folder / "looked_at" / "dataset_report.json").read_text())["datasets"]
    assert entry["unread"] == 0 and entry["copies"] == []  # what encoding brought to light
