"""What is recorded about a step, and when a run has diverged: its loss or gradient is no longer finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from helpers.data.base.sample import Sample
from helpers.data.batches import Batch
from helpers.errors import Interrupted, TrainingError
from helpers.protocols import Corrupted, StepResult
from helpers.training.checkpoints import Checkpointer
from helpers.training.engine import Update
from helpers.training.state import TrainState

# Steps in a row without a finite loss and gradient, by precision. fp16 first has to find the scale of its loss, and later loses single
# steps where it tries a larger one.
MOST_SKIPPED = {"no": 3, "bf16": 3, "fp16": 20}
MOST_SKIPPED_AT_THE_END = {"no": 0, "bf16": 0, "fp16": 1}


def timed(steps: Iterator[list[Batch]]) -> Iterator[tuple[list[Batch], float, float]]:
    """Each step's batches, the seconds waited for them, and when the waiting started (time.perf_counter)."""
    while True:
        began = time.perf_counter()
        batches = next(steps, None)
        if batches is None:
            return
        yield batches, time.perf_counter() - began, began


def step_result(state: TrainState, update: Update, batches: Sequence[Batch], began: float, waited: float) -> StepResult:
    """The result of the step that `state` has just counted. A loss or gradient that is not finite is None."""
    return StepResult(
        step=state.step,
        epoch=batches[0].epoch,
        loss=update.loss if update.samples and math.isfinite(update.loss) else None,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm if math.isfinite(update.grad_norm) else None,
        seconds=time.perf_counter() - began,
        data_seconds=waited,
        samples=update.samples,
        skipped=not update.taken,
        text_encoder_lr=update.text_learning_rate,
    )


def stop_if_diverged(state: TrainState, mixed_precision: str, samples: Sequence[Sample], checkpoints: Checkpointer) -> None:
    """TrainingError that names the last samples and the checkpoint to resume from, after too many skipped steps in a row."""
    if state.skipped_in_a_row > MOST_SKIPPED[mixed_precision]:
        keys = ", ".join(f"{sample.dataset}/{sample.key}" for sample in samples)
        raise TrainingError(
            f"Loss or gradient was not finite for {state.skipped_in_a_row} steps in a row, the last at step {state.step} with {keys}. "
            f"{_remedy(state, mixed_precision, checkpoints)}"
        )


def has_diverged(state: TrainState, mixed_precision: str) -> bool:
    """Whether the weights are not to be used, because the last steps had no finite loss or gradient with them."""
    return state.skipped_in_a_row > MOST_SKIPPED_AT_THE_END[mixed_precision] or 0 < state.skipped_in_a_row == state.step


def refuse_export(state: TrainState, mixed_precision: str, checkpoints: Checkpointer) -> None:
    """TrainingError if the run ends diverged."""
    if not has_diverged(state, mixed_precision):
        return
    if not state.updates:
        raise TrainingError("No step had a finite loss and gradient: nothing was learned, and nothing is exported.")
    raise TrainingError(
        f"Loss or gradient was not finite in the last {state.skipped_in_a_row} steps: the weights have diverged and are not exported. "
        f"{_remedy(state, mixed_precision, checkpoints)}"
    )


def interrupted(step: int, total: int) -> Interrupted:
    """The end of a run that was asked to stop after `step` steps and has been saved."""
    saved = f"stopped after step {step:,} of {total:,}, which is saved" if step else "stopped before the first step"
    return Interrupted(f"{saved}; run the same command to resume.")


def _remedy(state: TrainState, mixed_precision: str, checkpoints: Checkpointer) -> str:
    """How to continue from the last weights that computed a finite step."""
    good, newest = checkpoints.last_good(state.updates), checkpoints.newest()
    lower = "a lower --learning_rate" + (" or --mixed_precision=bf16" if mixed_precision == "fp16" else "")
    if good is None:
        return f"No checkpoint is from before that: start again with {lower} and another --output_dir."
    if good.name == newest:
        return f"Resume from {good.name}, which is from before that, with {lower}."
    return f"Resume with --resume_from_checkpoint={good.name}, the newest with which a step was finite, and with {lower}."


def sample_rows(step: int, batch: Batch, corrupted: Corrupted, losses: Tensor) -> list[dict[str, Any]]:
    """One row per sample of a micro-batch; none for a placeholder batch.

    `loss` includes the sample's weights, as it is optimized, and is None if not finite.
    """
    weighted = (losses.detach().float().cpu() * batch.loss_weight).tolist()
    timesteps = corrupted.timesteps.cpu().tolist()
    return [
        {
            "step": step,
            "place": batch.places[i],
            "dataset": sample.dataset,
            "key": sample.key,
            "caption": batch.captions[i],
            **({"dropped_encoders": list(batch.dropped_encoders[i])} if batch.dropped_encoders else {}),
            "timestep": timesteps[i],
            "crop": [geometry.top, geometry.left],
            "target_size": [geometry.target.height, geometry.target.width],
            "original_size": [geometry.original.height, geometry.original.width],
            **({"mask": round(float(batch.mask[i].mean()), 6)} if batch.mask is not None else {}),
            "loss": weighted[i] if math.isfinite(weighted[i]) else None,
        }
        for i, (sample, geometry) in enumerate(zip(batch.samples, batch.geometry, strict=True))
        if not batch.stands_in
    ]


def in_order(rows_by_rank: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all processes, sorted by their place in the global step."""
    return sorted((row for rows in rows_by_rank for row in rows), key=lambda row: row["place"])
