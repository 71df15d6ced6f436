"""Progress bars for long work, if the reporter shows any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.data.ports import DataReporter


@contextmanager
def bar(report: DataReporter, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar while the block runs. Yields a function to call with the number of units done since the last call."""
    shown = report.progress(title, total, unit)
    if shown is None:
        yield lambda done: None
        return
    with shown as advance:
        yield advance


@contextmanager
def late_bar(report: DataReporter, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """As `bar`, for work that reports (done, total). The bar appears with the first report, so a warm start shows none."""
    with ExitStack() as stack:
        advance: Callable[[int], None] | None = None
        done_before = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal advance, done_before
            if advance is None:
                advance = stack.enter_context(bar(report, title, total, unit))
            advance(done - done_before)
            done_before = done

        yield on_progress
