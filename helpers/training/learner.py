"""The trained weights with their optimizer and average: saved, restored, and exported as one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.protocols import LIVE, Trainable, TrainingMethod
from helpers.training.ema import Average
from helpers.training.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Learner:
    """Everything that a checkpoint holds, except the position of the run."""

    method: TrainingMethod
    trainable: Trainable
    engine: Engine
    average: Average | None

    def write_weights(self, folder: Path) -> None:
        """Write the weights in the files that other tools load, under the names that `export` gives them.

        With EMA, the plain names have the average, and `..._live` the live weights. Those of a schedule-free optimizer are its average.
        """
        with self.engine.averaged():
            self.method.save(self.trainable, folder, label=self._live)
        if self.average is not None:
            self.method.save(self.trainable, folder, self.average.shadow)

    @property
    def _live(self) -> str:
        return LIVE if self.average is not None else ""

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's tensors by name, and everything else as JSON values."""
        return self.engine.state()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimizer and average exactly as they were saved."""
        self.trainable.put(self.method.read(self.trainable, checkpoint.folder, self._live))
        self.engine.restore(checkpoint.optimizer_tensors(), checkpoint.content["numbers"])
        if self.average is not None:
            self.average.restore(self.method.read(self.trainable, checkpoint.folder))

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network uses the average if there is one: the EMA, or that of a schedule-free optimizer."""
        return self.average.swapped_in() if self.average is not None else self.engine.averaged()

    def export(self, folder: Path, schedule: Mapping[str, Any]) -> list[Path]:
        """Write the final files: the average if there is one, and the live weights beside it. => their paths"""
        shadow: Mapping[str, Tensor] | None = self.average.shadow if self.average is not None else None
        with self.engine.averaged():
            return self.method.export(self.trainable, folder, schedule, shadow)
