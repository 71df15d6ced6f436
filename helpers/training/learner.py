"""What is being trained, whole: the weights that move, their optimiser, their average; how it is kept and put back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.protocols import Trainable, TrainingMethod
from helpers.training.ema import Average
from helpers.training.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.training.checkpoints import Checkpoint

EMA_LABEL = "_ema"


@dataclass(frozen=True)
class Learner:
    """One object for everything that a checkpoint holds beside the run's position."""

    method: TrainingMethod
    trainable: Trainable
    engine: Engine
    average: Average | None

    def write_weights(self, folder: Path) -> None:
        """The live weights, or the average that the optimiser means, and the EMA beside them, in the files that other tools load."""
        with self.engine.averaged():
            self.method.save(self.trainable, folder)
        if self.average is not None:
            self.method.save(self.trainable, folder, self.average.shadow, EMA_LABEL)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and all the rest as JSON values."""
        return self.engine.state()

    def restore(self, found: Checkpoint) -> None:
        """Put weights, optimiser and average back exactly as they were saved."""
        self.trainable.put(self.method.read(self.trainable, found.folder))
        self.engine.restore(found.optimizer_tensors(), found.content["numbers"])
        if self.average is not None:
            self.average.restore(self.method.read(self.trainable, found.folder, EMA_LABEL))

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network runs on the average, where there is one: the EMA's or the optimiser's."""
        return self.average.swapped_in() if self.average is not None else self.engine.averaged()

    def export(self, folder: Path, schedule: Mapping[str, Any]) -> list[Path]:
        """Write what the user came for: the average where there is one, with the live weights beside it."""
        shadow: Mapping[str, Tensor] | None = self.average.shadow if self.average is not None else None
        with self.engine.averaged():
            return self.method.export(self.trainable, folder, schedule, shadow)
