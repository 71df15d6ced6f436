"""The numbers that a run carries from one life to the next."""

from __future__ import annotations

import pytest

from helpers.errors import CheckpointError
from helpers.training.state import TrainState, resume_accumulation


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


def test_steps_without_a_finite_gradient_are_counted() -> None:
    state = TrainState(seed=1)
    state.advance(True)
    for _ in range(2):
        state.advance(False)
    assert (state.step, state.updates, state.skipped_in_a_row) == (3, 1, 2)
    state = TrainState.from_json(TrainState(seed=1, step=3, updates=1, skipped_in_a_row=2).to_json())
    state.advance(True)
    assert (state.updates, state.skipped_in_a_row) == (2, 0)


def test_a_step_without_samples_is_a_step_and_no_fault() -> None:
    state = TrainState(seed=1)
    for _ in range(10):
        state.advance(False, empty=True)
    assert (state.step, state.updates, state.skipped_in_a_row) == (10, 0, 0)
