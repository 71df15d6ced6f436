"""Bars for long work, where the reporter shows any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.data.ports import DataReporter


@contextmanager
def bar(report: DataReporter, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more units are done."""
    shown = report.progress(title, total, unit)
    if shown is None:
        yield lambda done: None
        return
    with shown as advance:
        yield advance


@contextmanager
def late_bar(report: DataReporter, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that tells (done, total); shown when it is first told of, so that a warm start shows none."""
    with ExitStack() as stack:
        advance: Callable[[int], None] | None = None
        done_before = 0

        def told(done: int, total: int) -> None:
            nonlocal advance, done_before
            if advance is None:
                advance = stack.enter_context(bar(report, title, total, unit))
            advance(done - done_before)
            done_before = done

        yield told
