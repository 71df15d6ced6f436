"""The numbers that a run carries from one life to the next."""

from __future__ import annotations

import pytest

from helpers.data.base.sample import Sample, Size
from helpers.errors import CheckpointError, TrainingError
from helpers.training.state import TrainState, resume_accumulation

SAMPLES = [Sample("cats", "a/tom.png", Size(64, 64), ("a cat",))]


def stored(accumulation: int, processes: int) -> dict[str, int]:
    return {"gradient_accumulation_steps": accumulation, "processes": processes}


def test_accumulation_follows_the_number_of_processes() -> None:
    assert resume_accumulation(None, 4, 2, "") == 4
    assert resume_accumulation(stored(4, 1), 4, 1, "checkpoint-5") == 4
    for processes, expected in ((2, 2), (4, 1)):
        assert resume_accumulation(stored(4, 1), 4, processes, "checkpoint-5") == expected
    assert resume_accumulation(stored(4, 1), 2, 2, "checkpoint-5") == 2


def test_a_batch_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(CheckpointError, match="3 processes cannot share evenly"):
        resume_accumulation(stored(4, 1), 4, 3, "checkpoint-5")
    with pytest.raises(CheckpointError, match="the batch of a run cannot change"):
        resume_accumulation(stored(4, 1), 8, 1, "checkpoint-5")


def test_steps_without_a_finite_gradient_are_counted_and_then_end_the_run() -> None:
    state = TrainState(seed=1)
    state.advance(True, 2, SAMPLES)
    for _ in range(2):
        state.advance(False, 2, SAMPLES)
    assert (state.step, state.updates, state.skipped_in_a_row) == (3, 1, 2)
    with pytest.raises(TrainingError, match="cats/a/tom.png"):
        state.advance(False, 2, SAMPLES)
    state = TrainState.from_json(TrainState(seed=1, step=3, updates=1, skipped_in_a_row=2).to_json())
    state.advance(True, 2, SAMPLES)
    assert (state.updates, state.skipped_in_a_row) == (2, 0)


def test_a_step_without_samples_is_a_step_and_no_fault() -> None:
    state = TrainState(seed=1)
    for _ in range(10):
        state.advance(False, 3, [], empty=True)
    assert (state.step, state.updates, state.skipped_in_a_row) == (10, 0, 0)
