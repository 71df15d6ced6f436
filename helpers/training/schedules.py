"""Learning-rate schedules as pure functions of the optimizer step: no state, the same on any number of processes.

t = optimizer step from 0, N = steps of the run, w = warm-up steps, L = learning rate, E = its floor (`lr_end`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.config.options import ScheduleOptions

WITHOUT_WARMUP = ("constant", "sine")
LONGEST_WARMUP = 100  # steps, unless the user sets them
HALF_A_SINE = 500  # steps, unless the user sets them


@dataclass(frozen=True)
class Schedule:
    """`schedule(t)` is the learning rate of optimizer step t, counted from 0."""

    name: str
    rate: float
    floor: float
    warmup_steps: int
    total_steps: int
    cycles: float = 1.0
    power: float = 1.0

    @classmethod
    def create(cls, options: ScheduleOptions, total_steps: int) -> Schedule:
        return cls(
            name=options.lr_scheduler,
            rate=options.learning_rate,
            floor=options.lr_end,
            warmup_steps=_warmup_steps(options, total_steps),
            total_steps=total_steps,
            cycles=options.lr_num_cycles,
            power=options.lr_power,
        )

    @property
    def mean(self) -> float:
        """The mean learning rate over the run: of all steps, or of a thousand of them that are spread evenly."""
        steps = range(0, self.total_steps, max(1, self.total_steps // 1000))
        return sum(map(self, steps)) / len(steps) if steps else self.rate

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps and self.name not in WITHOUT_WARMUP:
            return self.rate * (step + 1) / self.warmup_steps
        return _SHAPES[self.name](self, step)

    def progress(self, step: int) -> float:
        """p in [0, 1]: the position of step t between the end of the warm-up (0) and the end of the run (1)."""
        length = max(1, self.total_steps - self.warmup_steps)
        return min(1.0, (step - self.warmup_steps) / length)


def _warmup_steps(options: ScheduleOptions, total_steps: int) -> int:
    """A short run learns too: unless the user sets the warm-up, it is at most a tenth of the run."""
    if options.lr_warmup_steps is not None:
        return options.lr_warmup_steps
    return HALF_A_SINE if options.lr_scheduler == "sine" else min(LONGEST_WARMUP, total_steps // 10)


def _constant(schedule: Schedule, step: int) -> float:
    return schedule.rate


def _linear(schedule: Schedule, step: int) -> float:
    """L + (E - L) p"""
    return schedule.rate + (schedule.floor - schedule.rate) * schedule.progress(step)


def _cosine(schedule: Schedule, step: int) -> float:
    """E + (L - E) (1 + cos(pi p)) / 2"""
    return schedule.floor + (schedule.rate - schedule.floor) * (1 + math.cos(math.pi * schedule.progress(step))) / 2


def _cosine_with_restarts(schedule: Schedule, step: int) -> float:
    """The cosine once per cycle: p is replaced by the fractional part of p x cycles."""
    fraction = math.modf(schedule.progress(step) * schedule.cycles)[0]
    return schedule.floor + (schedule.rate - schedule.floor) * (1 + math.cos(math.pi * fraction)) / 2


def _polynomial(schedule: Schedule, step: int) -> float:
    """E + (L - E) (1 - p)^power"""
    return schedule.floor + (schedule.rate - schedule.floor) * (1 - schedule.progress(step)) ** schedule.power


def _sine(schedule: Schedule, step: int) -> float:
    """A sine wave from the floor, with peaks at steps w, 3w, 5w ... The settings refuse w = 0."""
    return schedule.floor + (schedule.rate - schedule.floor) * (1 - math.cos(math.pi * step / schedule.warmup_steps)) / 2


_SHAPES: dict[str, Callable[[Schedule, int], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "sine": _sine,
}
