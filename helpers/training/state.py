"""The few numbers of a run that change, and the settings that may not change between two lives of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from helpers.data.order.epoch_order import FROM_THE_BEGINNING, OrderStart
from helpers.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    from helpers.data.base.sample import Sample


@dataclass
class TrainState:
    """Everything about the position of a run that cannot be computed from its settings."""

    seed: int
    step: int = 0  # steps done
    updates: int = 0  # of them, those that moved the weights: the clock of learning rate and average
    skipped_in_a_row: int = 0
    order: OrderStart = FROM_THE_BEGINNING  # where the present data took over
    trackers: dict[str, str] = field(default_factory=dict)  # run ids, so that a resumed run goes on in the same curve

    def advance(self, moved: bool, most_skipped: int, samples: Sequence[Sample], empty: bool = False) -> None:
        """One step done; `empty` where none of its samples could be had.

        Raises TrainingError naming the samples after too many steps in a row without a finite gradient.
        """
        self.step += 1
        if moved:
            self.updates += 1
            self.skipped_in_a_row = 0
        if moved or empty:
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > most_skipped:
            keys = ", ".join(f"{sample.dataset}/{sample.key}" for sample in samples)
            raise TrainingError(
                f"Loss or gradient was not finite for {self.skipped_in_a_row} steps in a row, the last at step {self.step} with {keys}. "
                "The newest checkpoint is from before; a lower learning rate or --mixed_precision=bf16 may help."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        return cls(**{**values, "order": OrderStart(**values["order"])})


def require_same(stored: Mapping[str, Any], current: Mapping[str, Any], checkpoint: str, remedy: str) -> None:
    """Refuse to go on with other settings than the checkpoint was made with, naming each difference."""
    names = [name for name in {**stored, **current} if stored.get(name) != current.get(name)]
    if names:
        differences = "; ".join(f"{name} was {stored.get(name)!r} and is now {current.get(name)!r}" for name in names)
        raise CheckpointError(f"{checkpoint} belongs to a run with other settings: {differences}. {remedy}")


def resume_accumulation(stored: Mapping[str, int] | None, accumulation: int, world_size: int, checkpoint: str) -> tuple[int, str | None]:
    """Micro-batches of each process in a step, so that a resumed run keeps its global batch, and what to say if that changed.

    `stored` holds "gradient_accumulation_steps" and "processes" of the run so far, or is None for a new run.
    """
    if stored is None:
        return accumulation, None
    per_step = stored["gradient_accumulation_steps"] * stored["processes"]
    if accumulation * world_size == per_step:
        return accumulation, None
    if accumulation != stored["gradient_accumulation_steps"]:
        raise CheckpointError(
            f"{checkpoint} was trained with {per_step} micro-batches a step, and --gradient_accumulation_steps={accumulation} on "
            f"{world_size} process(es) makes {accumulation * world_size}: the batch of a run cannot change. "
            "Choose another --output_dir for a new run."
        )
    if per_step % world_size:
        raise CheckpointError(
            f"{checkpoint} was trained with {per_step} micro-batches a step, which {world_size} processes cannot share evenly: "
            f"resume on a number of processes that divides {per_step}."
        )
    return per_step // world_size, (
        f"gradient_accumulation_steps becomes {per_step // world_size}: this run began on {stored['processes']} process(es) "
        f"and goes on on {world_size}, with the same {per_step} micro-batches a step"
    )
