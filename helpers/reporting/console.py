"""Terminal output: one line per chapter, a progress bar for long work, and at the end the list of files."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from helpers.errors import visible
from helpers.protocols import Reporter, StepResult, ValidationImage

INDENT = 11  # width of a chapter's title, in columns
PLAIN_WIDTH = 160  # line width without a terminal
PLAIN_EVERY_S = 15.0  # without a terminal, at most one progress line in this time


class Rate(ProgressColumn):
    """Units per second, or seconds per unit if slow."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(rate(task.speed or 0.0, self.unit))


def rate(per_second: float, unit: str) -> str:
    if per_second <= 0:
        return "-"
    return f"{per_second:,.1f} {unit}/s" if per_second >= 1 else f"{1 / per_second:,.1f} s/{unit.rstrip('s')}"


class FailureReporter(Reporter):
    """Console of a process other than the main process: prints only the reason why it failed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def failed(self, reason: str) -> None:
        print(visible(f"{self.name}: {reason}"), file=sys.stderr, flush=True)


class Console(Reporter):
    """Console of the main process."""

    def __init__(self) -> None:
        self.out = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.total_steps = 0
        self.training: Progress | None = None
        self.task: TaskID | None = None
        self.last_plain = 0.0

    def chapter(self, title: str, text: str) -> None:
        width = self.out.width if self.out.is_terminal else PLAIN_WIDTH
        first, *more = textwrap.wrap(visible(text), max(40, width - INDENT), break_long_words=False, break_on_hyphens=False) or [""]
        self.out.print(f"[bold]{title:<{INDENT}}[/bold]", end="")
        self.out.print("\n".join([first, *(" " * INDENT + line for line in more)]), markup=False)

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        bar = self._bar(unit)
        if not self.out.is_terminal:
            yield self._plain(title, total, unit)
            return
        with bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.advance(task, done)

    def started(self, settings: Mapping[str, Any], total_steps: int) -> None:
        self.total_steps = total_steps

    def stepped(self, result: StepResult) -> None:
        facts = step_facts(result)
        if result.skipped:
            self.chapter("skipped", f"step {result.step:,}: {facts}")
        if not self.out.is_terminal:
            self._plain_step(result, facts)
            return
        if self.training is None:
            self.training = self._bar("steps", TextColumn("{task.fields[facts]}"))
            self.task = self.training.add_task("training", total=self.total_steps, completed=result.step - 1, facts="")
            self.training.start()
        assert self.task is not None
        self.training.update(self.task, completed=result.step, facts=facts)

    def validated(self, step: int, images: Sequence[ValidationImage]) -> None:
        self.chapter(
            "validation",
            f"step {step:,}: {len(images)} image{'s' if len(images) != 1 else ''} in {images[0].path.parent}"
            if images
            else f"step {step:,}: stopped",
        )

    def saved(self, step: int, folder: Path) -> None:
        self.chapter("checkpoint", f"{folder}{_size(folder)}")

    def finished(self, step: int, outputs: Sequence[Path]) -> None:
        self._stop_bar()
        self.chapter("finished", f"{step:,} steps. Files:")
        for path in outputs:
            self.out.print(visible(f"  {path}"), markup=False)

    def failed(self, reason: str) -> None:
        self._stop_bar()
        self.chapter("stopped", reason)

    def close(self) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self.training is not None:
            self.training.stop()
            self.training = None

    def _bar(self, unit: str, *more: Any) -> Progress:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, *more, console=self.out)

    def _plain(self, title: str, total: int, unit: str) -> Callable[[int], None]:
        started = last = time.monotonic()
        done = 0

        def advance(more: int) -> None:
            nonlocal done, last
            done += more
            now = time.monotonic()
            if now - last >= PLAIN_EVERY_S or (done == total and now - started >= PLAIN_EVERY_S):
                last = now
                speed = done / max(now - started, 1e-9)
                print(
                    f"{title:<{INDENT}}{done:,} of {total:,} · {rate(speed, unit)} · {(total - done) / speed:,.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        return advance

    def _plain_step(self, result: StepResult, facts: str) -> None:
        now = time.monotonic()
        total = self.total_steps
        if now - self.last_plain >= PLAIN_EVERY_S or result.step == total:
            self.last_plain = now
            left = (total - result.step) * result.seconds
            print(
                f"{'training':<{INDENT}}step {result.step:,} of {total:,} · {facts} · {result.seconds:.2f} s/step · {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def step_facts(result: StepResult) -> str:
    """Loss, learning rate and gradient of a step in one line."""
    loss = "no image could be read" if not result.samples else "loss not finite" if result.loss is None else f"loss {result.loss:.4f}"
    text = "" if result.text_encoder_lr is None else f" (text {result.text_encoder_lr:.2e})"
    grad = "not finite" if result.grad_norm is None else f"{result.grad_norm:.3f}"
    return f"{loss} · lr {result.learning_rate:.2e}{text} · grad {grad}"


def _size(folder: Path) -> str:
    """The size of a folder's files, in brackets. Empty if they cannot be read: what is shown must not end a run."""
    try:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except OSError:
        return ""
    return f" ({size / 1e6:,.1f} MB)"
