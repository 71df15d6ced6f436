"""Two runs at the same time: one folder of latents and one of embeddings serve both, a folder that is one run's own serves no other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.harness import NO_VALIDATION, Trainer, draw_images
from toolkit.cache.command import main

SETTINGS = {"max_train_steps": 2, **NO_VALIDATION}

pytestmark = pytest.mark.slow


def runs_beside_each_other(first: Trainer, second: Trainer, **settings: object) -> list[tuple[int, str]]:
    processes = [trainer.start(**settings) for trainer in (first, second)]
    said = [process.communicate(timeout=600)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_two_runs_fill_one_folder_of_latents_at_once_and_lose_nothing(tmp_path: Path) -> None:
    """Their images overlap, so both write some of the same keys."""
    trainers = []
    for name, count in (("one", 12), ("two", 20)):
        folder = tmp_path / name
        folder.mkdir()
        trainers.append(Trainer(draw_images(folder / "images", count), folder, settings=SETTINGS))
    shared = {"cache_dir_vae": tmp_path / "latents", "cache_dir_text": tmp_path / "text"}
    for code, said in runs_beside_each_other(*trainers, **shared):
        assert code == 0, said
    assert main(["verify", f"--cache_dir={tmp_path / 'latents'}"]) == main(["verify", f"--cache_dir={tmp_path / 'text'}"]) == 0
    for trainer, count in zip(trainers, (12, 20), strict=True):
        again = trainer.finish(max_train_steps=3, **shared)
        assert f"{count} needed, {count} cached" in again.printed  # nothing is encoded twice
        [entry] = json.loads((again.folder / "dataset_report.json").read_text())["datasets"]
        assert entry["used"] == count
        assert main(["why", "a_red_circle_07.png", f"--output_dir={again.folder}"]) == 0


def test_a_second_run_in_the_same_cache_dir_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    trainer = Trainer(draw_images(tmp_path / "images", 6), tmp_path, settings=SETTINGS)
    first = trainer.start("one", cache_dir=tmp_path / "cache")
    lock = tmp_path / "cache" / ".lock"
    while first.poll() is None and not (lock.exists() and lock.read_text() == str(first.pid)):
        time.sleep(0.02)
    second = trainer.run("two", cache_dir=tmp_path / "cache")
    said, _ = first.communicate(timeout=600)
    assert first.returncode == 0, said
    assert second.code == 2 and f"--cache_dir={tmp_path / 'cache'} is in use by another run (pid {first.pid})" in second.printed
