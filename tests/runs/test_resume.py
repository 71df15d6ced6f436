"""Pull the plug and lose nothing: a run that was killed or stopped ends in the same bytes as one that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs.conftest import Ended, Trainer

SameWeights = Callable[[Ended, Ended], bool]
TWO = {"TRAINING_NUM_PROCESSES": "2"}


def without_loss(ended: Ended) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "loss"} for row in ended.rows("samples.jsonl")]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], object]] = {
    "scan": lambda out: (out / "cache" / "catalogue.sqlite").exists(),
    "caching": lambda out: (out / "cache" / "latents" / "index.sqlite").exists(),
    "step": lambda out: lines(out / "metrics.jsonl") >= 3,
    "save": lambda out: any(path.name.startswith(".checkpoint-") for path in out.iterdir()) if out.exists() else False,
    "validation": lambda out: (out / "validation_images").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(
    moment: str, trainer: Trainer, finished: Ended, same_weights: SameWeights
) -> None:
    process = trainer.start()
    wait_for(lambda: MOMENTS[moment](trainer.folder / "out"), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = trainer.finish()
    assert again.losses == finished.losses
    assert again.rows("samples.jsonl") == finished.rows("samples.jsonl")
    assert same_weights(finished, again)


@pytest.mark.slow
def test_killed_again_and_again_at_random_it_ends_in_the_same_bytes(
    trainer: Trainer, finished: Ended, same_weights: SameWeights
) -> None:
    """SIMPLETUNER_TEST_LONG=1 kills 40 times instead of 4."""
    kills = 40 if os.environ.get("SIMPLETUNER_TEST_LONG") else 4
    chance = random.Random(0)
    for _ in range(kills):
        process = trainer.start()
        try:
            process.wait(timeout=chance.uniform(2, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    again = trainer.finish()
    assert again.losses == finished.losses
    assert same_weights(finished, again)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_wrapper_saves_and_exits_75(
    number: signal.Signals, trainer: Trainer, finished: Ended, same_weights: SameWeights
) -> None:
    process = trainer.start(wrapper="train_sdxl.sh", checkpointing_steps=100)
    wait_for(lambda: lines(trainer.folder / "out" / "metrics.jsonl") >= 3, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "going on" not in said
    again = trainer.finish(wrapper="train_sdxl.sh")
    assert "going on from checkpoint-" in again.said
    assert again.losses == finished.losses
    assert same_weights(finished, again)


@pytest.mark.slow
def test_two_processes_share_a_step_as_one_would_accumulate_it(trainer: Trainer, finished: Ended, same_weights: SameWeights) -> None:
    two = trainer.finish(wrapper="train_sdxl.sh", environ=TWO, gradient_accumulation_steps=1)
    assert without_loss(two) == without_loss(finished)
    assert two.losses == pytest.approx(finished.losses, rel=1e-6)
    assert same_weights(finished, two)


@pytest.mark.slow
def test_two_killed_processes_go_on_as_two_and_stopped_ones_as_one(
    trainer: Trainer, finished: Ended, same_weights: SameWeights
) -> None:
    process = trainer.start(wrapper="train_sdxl.sh", environ=TWO, gradient_accumulation_steps=1)
    wait_for(lambda: lines(trainer.folder / "out" / "metrics.jsonl") >= 3, process)
    process.kill()
    process.wait()
    process = trainer.start(wrapper="train_sdxl.sh", environ=TWO, gradient_accumulation_steps=1)
    wait_for(lambda: lines(trainer.folder / "out" / "metrics.jsonl") >= 4, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    alone = trainer.finish(gradient_accumulation_steps=1)
    assert "gradient_accumulation_steps becomes 2" in alone.said
    assert without_loss(alone) == without_loss(finished)
    assert alone.losses == pytest.approx(finished.losses, rel=1e-6)
    assert same_weights(finished, alone)


@pytest.mark.slow
def test_validation_leaves_no_trace_in_training(trainer: Trainer, finished: Ended, same_weights: SameWeights) -> None:
    unwatched = trainer.finish(validation_prompt=None, validation_disable_unconditional=True)
    assert not (unwatched.folder / "validation_images").exists()
    assert unwatched.losses == finished.losses
    assert same_weights(finished, unwatched)


@pytest.mark.slow
def test_a_longer_run_goes_on_and_a_finished_one_is_finished(trainer: Trainer, finished: Ended, same_weights: SameWeights) -> None:
    short = trainer.finish(max_train_steps=4)
    assert len(short.losses) == 4
    longer = trainer.finish(max_train_steps=6)
    assert longer.losses == finished.losses
    assert same_weights(finished, longer)
    before = {path: path.stat().st_mtime_ns for path in longer.folder.glob("checkpoint-*/*")}
    once_more = trainer.finish(max_train_steps=6)
    assert {path: path.stat().st_mtime_ns for path in once_more.folder.glob("checkpoint-*/*")} == before


@pytest.mark.slow
def test_a_resume_that_does_not_fit_names_the_difference(trainer: Trainer) -> None:
    trainer.finish(max_train_steps=2)
    other = trainer.run(max_train_steps=4, lora_rank=8, seed=7)
    assert other.code == 2
    assert "lora_rank was 16 and is now 8" in other.said
    assert "seed was 42 and is now 7" in other.said
