"""What is recorded about a step: its row in metrics.jsonl and its rows in samples.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from helpers.data.batches import Batch
from helpers.protocols import Corrupted, StepResult
from helpers.training.engine import Update
from helpers.training.state import TrainState


def timed(steps: Iterator[list[Batch]]) -> Iterator[tuple[list[Batch], float, float]]:
    """Each step's batches, the seconds waited for them, and when the waiting started (time.perf_counter)."""
    while True:
        began = time.perf_counter()
        batches = next(steps, None)
        if batches is None:
            return
        yield batches, time.perf_counter() - began, began


def step_result(state: TrainState, update: Update, batches: Sequence[Batch], began: float, waited: float) -> StepResult:
    """The result of the step that `state` has just counted. A skipped step without finite numbers has 0 and `skipped`."""
    return StepResult(
        step=state.step,
        epoch=batches[0].epoch,
        loss=update.loss if math.isfinite(update.loss) else 0.0,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm if math.isfinite(update.grad_norm) else 0.0,
        seconds=time.perf_counter() - began,
        data_seconds=waited,
        samples=update.samples,
        skipped=not update.taken,
        text_encoder_lr=update.text_learning_rate,
    )


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
            "loss": weighted[i] if math.isfinite(weighted[i]) else None,
        }
        for i, (sample, geometry) in enumerate(zip(batch.samples, batch.geometry, strict=True))
        if not batch.stands_in
    ]


def in_order(rows_by_rank: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all processes, sorted by their place in the global step."""
    return sorted((row for rows in rows_by_rank for row in rows), key=lambda row: row["place"])
