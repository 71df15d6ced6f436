"""Retries for remote storage: random pauses, a deadline for each request, and a budget of failures for all of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Timeouts and limits, in seconds except for the budget. A try fails after silence, not after a total time: large objects take long."""

    connect: float = 10.0  # to establish a connection
    silence: float = 20.0  # without a byte
    deadline: float = 180.0  # no try starts later than this after the first
    first_deadline: float = 15.0  # the same while the store has never answered: its address may be wrong
    pause: float = 0.2  # upper bound of the first random pause; it doubles with each further pause
    longest_pause: float = 15.0
    budget: float = 2000.0  # failed tries after which the store counts as broken; see `Budget`


class Budget:
    """The failed tries that all threads together have left. A failure takes one, a success gives back a quarter.

    So a short outage is survived, but a store that fails more than every fifth request cannot slow a run down for days unnoticed.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._left = most
        self._lock = threading.Lock()
        self.has_answered = False  # whether the store has ever answered, also with an error

    def take(self) -> bool:
        """Count a failure. Returns whether the budget still lasts."""
        with self._lock:
            self._left = max(self._left - 1, 0)
            return self._left > 0

    def give_back(self) -> None:
        with self._lock:
            self.has_answered = True
            self._left = min(self._left + 0.25, self._most)


class GaveUp(Exception):
    """The store kept failing. The message says how many tries were made, and for how long.

    `errors` are the latest of each type, oldest first: what a store says once, before it falls silent, is often the cause.
    """

    def __init__(self, errors: Iterable[Exception], tries: int, seconds: float) -> None:
        self.errors = tuple(errors)
        self.last = self.errors[-1]
        super().__init__(f"{tries} {'try' if tries == 1 else 'tries'} in {seconds:.0f} s")


# A separate generator, so that nothing drawn for training depends on how often a store failed.
_pauses = random.Random()


def patiently(attempt: Callable[[], Result], is_temporary: Callable[[Exception], bool], patience: Patience, budget: Budget) -> Result:
    """The result of `attempt`, retried after temporary errors. GaveUp if they do not end; other errors are passed on.

    Pauses have full jitter (Brooker 2015, "Exponential Backoff and Jitter"), so that threads do not all retry at the same moment.
    """
    began = time.monotonic()
    tries = 0
    errors: dict[type[Exception], Exception] = {}
    while True:
        tries += 1
        try:
            result = attempt()
        except Exception as error:
            if not is_temporary(error):
                raise
            errors.pop(type(error), None)
            errors[type(error)] = failure = error
        else:
            budget.give_back()
            return result
        within_budget = budget.take()
        pause = _pauses.uniform(0, min(patience.pause * 2 ** (tries - 1), patience.longest_pause))
        deadline = patience.deadline if budget.has_answered else patience.first_deadline
        if not within_budget or time.monotonic() - began + pause > deadline:
            raise GaveUp(errors.values(), tries, time.monotonic() - began) from failure
        time.sleep(pause)
