"""A run that is being set up: what the parts of helpers/setup pass on to one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.config.config import Config
from helpers.training.checkpoints import Checkpoint, Checkpointer

if TYPE_CHECKING:
    from helpers.methods.base_lora import BaseLora
    from helpers.protocols import ModelFamily, Objective, TrainingMethod
    from helpers.reporting import Reporters
    from helpers.training.runtime import Runtime
    from helpers.training.state import TrainState


@dataclass(frozen=True)
class StartPoint:
    """Where training starts: at step 0, or at the checkpoint that it resumes from."""

    checkpoint: Checkpoint | None
    state: TrainState  # the checkpoint's, or a new run's
    accumulation: int  # micro-batches of each process in a step
    checkpoints: Checkpointer


@dataclass(frozen=True)
class Run:
    """One start of a run: its settings, this process, the choice on each axis, and where it starts."""

    config: Config
    runtime: Runtime
    report: Reporters
    family: ModelFamily
    method: TrainingMethod
    objective: Objective
    start: StartPoint
    base_lora: BaseLora | None = None  # added to the frozen weights of the base model

    @property
    def state(self) -> TrainState:
        """The position of the run. It advances with every step."""
        return self.start.state

    @property
    def checkpoints(self) -> Checkpointer:
        return self.start.checkpoints
