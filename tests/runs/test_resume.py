"""Pull the plug and lose nothing: a run that was killed or stopped ends in the same bytes as one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.storage.atomic import verify_manifest
from tests.harness import Ended, Trainer, free_port, lines, same_weights, succeeded, wait_for, without_loss
from tests.runs.evidence import refusal, unwrapped
from tests.warm_python import warm_python

WRAPPER = "train_sdxl.sh"
TWO = {"TRAINING_NUM_PROCESSES": "2"}
LONG = bool(os.environ.get("SIMPLETUNER_TEST_LONG"))


MOMENTS: dict[str, Callable[[Path], object]] = {
    "scan": lambda out: (out / "cache" / "catalogue.sqlite").exists(),
    "caching": lambda out: (out / "cache" / "latents" / "index.sqlite").exists(),
    "validation": lambda out: (out / "validation_images").exists(),
    "step": lambda out: lines(out / "metrics.jsonl") >= 3,
    "save": lambda out: any(path.name.startswith(".checkpoint-") for path in out.iterdir()) if out.exists() else False,
}


@pytest.mark.slow
@pytest.mark.parametrize("moments", [[moment] for moment in MOMENTS] if LONG else [list(MOMENTS)], ids=", ".join)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(moments: list[str], trainer: Trainer, finished: Ended) -> None:
    """One run is killed at each moment in turn. With SIMPLETUNER_TEST_LONG=1 there is a run for each of them instead."""
    for moment in moments:
        process = trainer.start()
        wait_for(lambda moment=moment: MOMENTS[moment](trainer.folder / "out"), process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    again = trainer.finish()
    assert again.losses == finished.losses
    assert again.rows("samples.jsonl") == finished.rows("samples.jsonl")
    assert same_weights(finished, again)


@pytest.mark.slow
def test_killed_again_and_again_at_random_it_ends_in_the_same_bytes(trainer: Trainer, finished: Ended) -> None:
    """SIMPLETUNER_TEST_LONG=1 kills 40 times instead of 4."""
    kills = 40 if os.environ.get("SIMPLETUNER_TEST_LONG") else 4
    chance = random.Random(0)
    for _ in range(kills):
        process = trainer.start()
        try:
            process.wait(timeout=chance.uniform(0.2, 4))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    again = trainer.finish()
    assert again.losses == finished.losses
    assert same_weights(finished, again)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_wrapper_saves_and_exits_75(number: signal.Signals, trainer: Trainer, finished: Ended) -> None:
    python = sys.executable if number == signal.SIGTERM else warm_python()
    process = trainer.start_plain(wrapper=WRAPPER, python=python, checkpointing_steps=100)
    wait_for(lambda: lines(trainer.folder / "out" / "metrics.jsonl") >= 3, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    again = trainer.finish()
    assert "resuming from checkpoint-" in again.printed
    assert again.losses == finished.losses
    assert same_weights(finished, again)


def slow_disk(folder: Path, seconds: float) -> dict[str, str]:
    """An environment in which flushing an optimiser's state to disk takes so long."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, time\n"
        "flush = os.fsync\n"
        "def fsync(descriptor):\n"
        "    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()\n"
        "    if os.readlink(f'/proc/self/fd/{number}').endswith('optimizer.safetensors'):\n"
        f"        time.sleep({seconds})\n"
        "    flush(descriptor)\n"
        "os.fsync = fsync\n"
    )
    return {"PYTHONPATH": str(folder)}


def is_saving(out: Path) -> bool:
    return out.exists() and any(out.glob(".checkpoint-*/optimizer.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_may_take_its_time_and_a_second_signal_does_not_wait_for_it(processes: int, trainer: Trainer) -> None:
    """SIMPLETUNER_TEST_LONG=1 makes the save take 40 seconds, which is more than launchers usually grant."""
    seconds = 40.0 if os.environ.get("SIMPLETUNER_TEST_LONG") else 4.0
    variables = slow_disk(trainer.folder / "slow", seconds) | {"TRAINING_NUM_PROCESSES": str(processes)}
    settings = {"checkpointing_steps": 100, "max_train_steps": 200, "validation_steps": 0}
    out = trainer.folder / "out"
    process = trainer.start_plain(wrapper=WRAPPER, python=warm_python(), variables=variables, **settings)
    wait_for(lambda: lines(out / "metrics.jsonl") >= 2, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    [checkpoint] = out.glob("checkpoint-*")

    process = trainer.start_plain(wrapper=WRAPPER, python=warm_python(), variables=variables, **settings)
    wait_for(lambda: lines(out / "metrics.jsonl") >= int(checkpoint.name.split("-")[1]) + 2, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: is_saving(out), process)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert time.monotonic() - asked < seconds
    assert list(out.glob("checkpoint-*")) == [checkpoint]


@pytest.mark.slow
def test_two_processes_share_a_step_as_one_would_accumulate_it(trainer: Trainer, finished: Ended) -> None:
    two = trainer.finish_on(2, gradient_accumulation_steps=1)
    assert without_loss(two) == without_loss(finished)
    assert two.losses == pytest.approx(finished.losses, rel=1e-6)
    assert same_weights(finished, two)


@pytest.mark.slow
def test_accelerate_launch_by_hand_does_the_same(trainer: Trainer, finished: Ended) -> None:
    launch = [warm_python(), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    port = f"--main_process_port={free_port()}"
    command = [*launch, "--mixed_precision=no", "--dynamo_backend=no", port]
    two = succeeded(trainer.run_plain(command=command, gradient_accumulation_steps=1))
    assert without_loss(two) == without_loss(finished)
    assert same_weights(finished, two)


@pytest.mark.slow
def test_two_killed_processes_go_on_as_two_and_stopped_ones_as_one(trainer: Trainer, finished: Ended) -> None:
    metrics = trainer.folder / "out" / "metrics.jsonl"
    ranks = trainer.start_on(2, gradient_accumulation_steps=1)
    wait_for(lambda: lines(metrics) >= 3, ranks[0])
    for rank in ranks:
        rank.kill()
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    before = metrics.stat().st_mtime_ns
    process = trainer.start_plain(wrapper=WRAPPER, python=warm_python(), variables=TWO, gradient_accumulation_steps=1)
    wait_for(lambda: lines(metrics) >= 3 and metrics.stat().st_mtime_ns > before, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    alone = trainer.finish(gradient_accumulation_steps=1)
    assert "gradient_accumulation_steps was 1 and is 2 from step" in unwrapped(alone.printed)
    assert without_loss(alone) == without_loss(finished)
    assert alone.losses == pytest.approx(finished.losses, rel=1e-6)
    assert same_weights(finished, alone)


@pytest.mark.slow
def test_a_longer_run_goes_on_and_a_finished_one_is_finished(trainer: Trainer, finished: Ended) -> None:
    short = trainer.finish(max_train_steps=4)
    assert len(short.losses) == 4
    longer = trainer.finish(max_train_steps=6)
    assert longer.losses == finished.losses
    assert same_weights(finished, longer)
    assert "has the learning rate" not in longer.printed  # a constant one does not
    before = {path: path.stat().st_mtime_ns for path in longer.folder.glob("checkpoint-*/*")}
    once_more = trainer.finish(max_train_steps=6)
    assert {path: path.stat().st_mtime_ns for path in once_more.folder.glob("checkpoint-*/*")} == before


@pytest.mark.slow
def test_going_on_from_a_named_checkpoint_leaves_the_later_ones_aside(trainer: Trainer, finished: Ended) -> None:
    output = shutil.copytree(finished.folder, trainer.folder / "out")
    back = trainer.finish(resume_from_checkpoint="checkpoint-2", max_train_steps=3)
    assert "later than checkpoint-2 and set aside: left-checkpoint-6, left-checkpoint-4" in unwrapped(back.printed)
    again = trainer.finish()
    assert "resuming from checkpoint-3" in unwrapped(again.printed)
    assert same_weights(finished, again)
    assert verify_manifest(output / "left-checkpoint-4") == []


@pytest.mark.slow
def test_a_resume_that_does_not_fit_names_the_difference(trainer: Trainer) -> None:
    trainer.finish(max_train_steps=2)
    other = trainer.run(max_train_steps=4, lora_rank=8, seed=7, sdxl_original_size="intermediary")
    said = refusal(other)
    assert "lora_rank was 16 and is now 8" in said
    assert "seed was 42 and is now 7" in said
    assert "sdxl_original_size was file and is now intermediary" in said
