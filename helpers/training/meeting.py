"""Where the processes of a run tell each other short texts while they work for hours, without a collective.

A collective that waits for a slow process ends in a timeout, or in a rank that cannot hear a signal. Here a process that waits looks
again and again, in Python: its signals are handled, and it hears that another one was asked to stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from helpers.training.stopping import StopRequest

POLL_SECONDS = 0.05
HEAR_SECONDS = 0.25  # between two looks whether another process was asked to stop
READ_SECONDS = 10.0  # for all processes to read what all have said
ANSWER_WITHIN = timedelta(minutes=5)  # of the store itself; nobody waits in it for another process


class Store(Protocol):
    """As much of `torch.distributed.Store` as is used."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Meeting:
    """One process's place among `world_size`. All processes gather equally often; `stop_asked` may be asked from any thread."""

    def __init__(self, rank: int, world_size: int, store: Store, stop: StopRequest) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._stop = stop
        self._rounds = 0
        self._told = False
        self._heard = False
        self._looked = float("-inf")

    def gather(self, text: str) -> Sequence[str]:
        """Every process's text, in the order of ranks, as soon as the last one has come."""
        self._rounds += 1
        self._store.set(f"{self._rounds}/{self._rank}", text)
        texts = [self._store.get(key).decode() for key in self._wait(f"{self._rounds}/")]
        self._store.set(f"{self._rounds}/read/{self._rank}", "")
        if self._rank == 0:  # it holds the store, and may leave with what it has just heard
            self._wait(f"{self._rounds}/read/", seconds=READ_SECONDS)
        return texts

    def _wait(self, prefix: str, seconds: float = float("inf")) -> list[str]:
        """Wait for a key of each process. => the keys"""
        keys = [f"{prefix}{rank}" for rank in range(self._world_size)]
        give_up = time.monotonic() + seconds
        pause = POLL_SECONDS / 64
        while not self._store.check(keys) and time.monotonic() < give_up:
            self.stop_asked()  # tells the others
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return keys

    def stop_asked(self) -> bool:
        """Whether any process has been asked to stop, as far as is known by now."""
        if self._stop.asked and not self._told:
            self._store.set("stop", "asked")
            self._told = self._heard = True
        if not self._heard and time.monotonic() - self._looked > HEAR_SECONDS:
            self._looked = time.monotonic()
            self._heard = self._store.check(["stop"])
        return self._heard


class Alone:
    """The meeting of a process that has no others."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def gather(self, text: str) -> Sequence[str]:
        return [text]

    def stop_asked(self) -> bool:
        return self._stop.asked
