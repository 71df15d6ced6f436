"""The position of a run: the few numbers that steps change. And what may not change on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from helpers.data.order.epoch_order import FROM_THE_BEGINNING, OrderStart
from helpers.errors import CheckpointError


@dataclass
class TrainState:
    """The position of a run, as far as it cannot be computed from the settings."""

    seed: int
    step: int = 0  # steps done
    updates: int = 0  # steps that changed the weights; learning rate and EMA count these
    skipped_in_a_row: int = 0
    order: OrderStart = FROM_THE_BEGINNING  # the step from which the present data is used
    trackers: dict[str, str] = field(default_factory=dict)  # run ids, so that a resumed run continues the same curves

    def advance(self, updated: bool, empty: bool = False) -> None:
        """Count one step: whether it updated the weights, or was `empty` because none of its samples could be read."""
        self.step += 1
        if updated:
            self.updates += 1
            self.skipped_in_a_row = 0
        elif not empty:
            self.skipped_in_a_row += 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        return cls(**{**values, "order": OrderStart(**values["order"])})


def resume_accumulation(stored: Mapping[str, int] | None, accumulation: int, world_size: int, checkpoint: str) -> int:
    """Micro-batches per process and step that keep the global batch of a resumed run.

    `stored` holds "gradient_accumulation_steps" and "processes" of the checkpoint, or is None for a new run. CheckpointError if the
    global batch cannot be kept.
    """
    if stored is None:
        return accumulation
    per_step = stored["gradient_accumulation_steps"] * stored["processes"]
    if accumulation * world_size == per_step:
        return accumulation
    if accumulation != stored["gradient_accumulation_steps"]:
        raise CheckpointError(
            f"{checkpoint} was trained with {per_step} micro-batches per step, but --gradient_accumulation_steps={accumulation} on "
            f"{world_size} process(es) gives {accumulation * world_size}: the batch of a run cannot change. "
            "Choose another --output_dir for a new run."
        )
    if per_step % world_size:
        raise CheckpointError(
            f"{checkpoint} was trained with {per_step} micro-batches per step, which {world_size} processes cannot share evenly: "
            f"resume on a number of processes that divides {per_step}."
        )
    return per_step // world_size
