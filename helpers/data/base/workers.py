"""This process among the processes of a run, as far as `data` needs to know them."""

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
    """This process among those of the run. The default is a single process that is never asked to stop.

    `gather` takes one text from each process, waits for all, and gives every process the list of texts in rank order. It must not time
    out: one process may encode for hours while another has nothing to do.
    `should_stop` says whether the user asked the run to stop. It is polled often, also from threads.
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
        """A block after which all processes wait for each other. If it fails in one, it fails in all: none waits forever."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        own = json.dumps([type(failure).__name__, str(failure)]) if failure else ""
        reports = self.gather(own)
        if failure is not None:
            raise failure
        for rank, text in enumerate(reports):
            if text:
                kind, message = json.loads(text)
                raise _KINDS.get(kind, RuntimeError)(message if kind in _KINDS else f"process {rank} failed: {kind}: {message}")
