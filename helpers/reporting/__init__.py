"""Reporters show and record how a run goes. They never influence it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.protocols import Reporter, StepResult, ValidationImage

if TYPE_CHECKING:
    from helpers.data.report.survey import Survey


class Reporters(Reporter):
    """Passes every event to all members, in order. Members may be added during the run."""

    def __init__(self, *members: Reporter) -> None:
        self.members = list(members)

    def surveyed(self, survey: Survey) -> None:
        for member in self.members:
            member.surveyed(survey)

    def started(self, settings: Mapping[str, Any], total_steps: int) -> None:
        for member in self.members:
            member.started(settings, total_steps)

    def chapter(self, title: str, text: str) -> None:
        for member in self.members:
            member.chapter(title, text)

    def progress(self, title: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        bars = [bar for member in self.members if (bar := member.progress(title, total, unit)) is not None]
        return bars[0] if bars else nullcontext(lambda done: None)

    def stepped(self, result: StepResult) -> None:
        for member in self.members:
            member.stepped(result)

    def sampled(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        for member in self.members:
            member.sampled(rows)

    def validated(self, step: int, images: Sequence[ValidationImage]) -> None:
        for member in self.members:
            member.validated(step, images)

    def saving(self, step: int) -> None:
        for member in self.members:
            member.saving(step)

    def saved(self, step: int, folder: Path) -> None:
        for member in self.members:
            member.saved(step, folder)

    def finished(self, step: int, outputs: Sequence[Path]) -> None:
        for member in self.members:
            member.finished(step, outputs)

    def failed(self, reason: str) -> None:
        for member in self.members:
            member.failed(reason)

    def close(self) -> None:
        for member in self.members:
            member.close()
