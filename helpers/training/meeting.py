"""Exchange of short texts between the processes of a run during long work, without a collective operation.

A collective that waits for a slow process times out, or blocks a rank so that it cannot handle signals. Here a waiting process polls
in Python: its signal handlers run, and it notices when another process was asked to stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from helpers.training.stopping import StopRequest

POLL_SECONDS = 0.05
STOP_POLL_SECONDS = 0.25  # between two checks whether another process was asked to stop
READ_SECONDS = 10.0  # that rank 0 waits for the others to read
ANSWER_WITHIN = timedelta(minutes=5)  # timeout of the store itself; no process waits in it for another


class Store(Protocol):
    """The used part of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Meeting:
    """One of `world_size` processes. All must call `gather` equally often; any thread may call `stop_asked`."""

    def __init__(self, rank: int, world_size: int, store: Store, stop: StopRequest) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._stop = stop
        self._rounds = 0
        self._published = False
        self._stopping = False
        self._checked_at = float("-inf")

    def gather(self, text: str) -> Sequence[str]:
        """The texts of all processes in rank order, once the last one has arrived."""
        self._rounds += 1
        self._store.set(f"{self._rounds}/{self._rank}", text)
        texts = [self._store.get(key).decode() for key in self._wait(f"{self._rounds}/")]
        self._store.set(f"{self._rounds}/read/{self._rank}", "")
        if self._rank == 0:  # it hosts the store, so it must outlast the readers
            self._wait(f"{self._rounds}/read/", seconds=READ_SECONDS)
        return texts

    def _wait(self, prefix: str, seconds: float = float("inf")) -> list[str]:
        """Wait until every process has set its key, at most `seconds`. => the keys"""
        keys = [f"{prefix}{rank}" for rank in range(self._world_size)]
        give_up = time.monotonic() + seconds
        pause = POLL_SECONDS / 64
        while not self._store.check(keys) and time.monotonic() < give_up:
            self.stop_asked()  # publishes a stop to the others
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return keys

    def stop_asked(self) -> bool:
        """Whether any process has been asked to stop, as far as this one knows."""
        if self._stop.asked and not self._published:
            self._store.set("stop", "asked")
            self._published = self._stopping = True
        if not self._stopping and time.monotonic() - self._checked_at > STOP_POLL_SECONDS:
            self._checked_at = time.monotonic()
            self._stopping = self._store.check(["stop"])
        return self._stopping


class Alone:
    """The same for a run of one process."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def gather(self, text: str) -> Sequence[str]:
        return [text]

    def stop_asked(self) -> bool:
        return self._stop.asked
