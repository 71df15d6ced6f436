"""How long a store that does not answer is asked again: after pauses drawn at random, until a deadline, within a budget."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Bounds of waiting, in seconds but for the budget. A try is failed by silence, not by being slow: a large object takes its time."""

    connect: float = 10.0  # for a connection
    silence: float = 20.0  # without a byte
    deadline: float = 180.0  # no try begins later than this after the first
    first_deadline: float = 15.0  # the same for a store that has never answered: its address may be wrong
    pause: float = 0.2  # the first pause is drawn between 0 and this; the bound doubles with each further one
    longest_pause: float = 15.0
    budget: float = 2000.0  # tries that may fail before the store counts as broken; see `Budget`


class Budget:
    """Failed tries that all threads together may still have: each takes one, each success gives back a quarter of one.

    So a storm is sat out, but a store that fails more than every fifth request does not slow a run down for days unnoticed.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._left = most
        self._lock = threading.Lock()
        self.has_answered = False  # the store, in whatever way

    def take(self) -> bool:
        """Whether one more failure is within the budget."""
        with self._lock:
            self._left = max(self._left - 1, 0)
            return self._left > 0

    def give_back(self) -> None:
        with self._lock:
            self.has_answered = True
            self._left = min(self._left + 0.25, self._most)


class GaveUp(Exception):
    """The store failed until patience ended; `last` is how it failed last, the message how often and for how long."""

    def __init__(self, last: Exception, tries: int, seconds: float) -> None:
        self.last = last
        super().__init__(f"{tries} {'try' if tries == 1 else 'tries'} in {seconds:.0f} s")


# Of its own, so that nothing that is drawn for training depends on how often a store failed.
_pauses = random.Random()


def patiently(attempt: Callable[[], Result], is_passing: Callable[[Exception], bool], patience: Patience, budget: Budget) -> Result:
    """What `attempt` returns, tried again after errors that may pass; GaveUp when they do not. Other errors are the caller's.

    Pauses have full jitter (Brooker 2015, "Exponential Backoff and Jitter"), so that many threads do not come back all at once.
    """
    began = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            result = attempt()
        except Exception as error:
            if not is_passing(error):
                raise
            failure = error
        else:
            budget.give_back()
            return result
        within_budget = budget.take()
        pause = _pauses.uniform(0, min(patience.pause * 2 ** (tries - 1), patience.longest_pause))
        deadline = patience.deadline if budget.has_answered else patience.first_deadline
        if not within_budget or time.monotonic() - began + pause > deadline:
            raise GaveUp(failure, tries, time.monotonic() - began) from failure
        time.sleep(pause)
