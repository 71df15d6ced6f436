"""The processes of a run, as far as data needs to know them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from helpers.errors import DataError, Interrupted, ModelError, StorageError

_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (DataError, ModelError, StorageError, Interrupted)}


def _alone(text: str) -> Sequence[str]:
    return [text]


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Workers:
    """This process among those of the run. The default is one process that nobody stops.

    `gather` takes a text of each process and gives every process all of them, in the order of ranks; it waits for all. A process
    may be hours behind another that had little to encode, so it must not time out sooner.
    `should_stop` is polled often, also from threads; it says whether the user wants this process to leave.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[str], Sequence[str]] = _alone
    should_stop: Callable[[], bool] = _never

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Work after which all wait for all. Where one fails, all fail here, so that none waits for one that has left."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = json.dumps([type(failure).__name__, str(failure)]) if failure else ""
        others = self.gather(told)
        if failure is not None:
            raise failure
        for rank, text in enumerate(others):
            if text:
                kind, message = json.loads(text)
                raise _KINDS.get(kind, RuntimeError)(message if kind in _KINDS else f"process {rank} failed: {kind}: {message}")
