"""metrics.jsonl and samples.jsonl: one JSON object per line. Each step appears once, however often the run was resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from helpers.errors import StorageError
from helpers.protocols import Reporter, StepResult
from helpers.storage.atomic import open_own, rewritten
from helpers.storage.full_disk import until_written

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
_LONGEST_LINE = 2**20  # bytes; ours have a few hundred, and a caption


class Records(Reporter):
    """Appends to the files in OUTPUT_DIR. A resumed run first removes the lines of later steps.

    `notes` say, in words for the user, what of the files could not be read or is missing. A damaged file never ends a run.
    """

    def __init__(self, output_dir: Path, resumed_at: int, record_samples: bool) -> None:
        self.notes: list[str] = []
        self._files: list[FileIO] = []
        self._metrics = self._continue(output_dir / METRICS, resumed_at)
        self._samples = self._continue(output_dir / SAMPLES, resumed_at) if record_samples else None

    def stepped(self, result: StepResult) -> None:
        _append(self._metrics, {name: value for name, value in asdict(result).items() if value is not None})

    def sampled(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._samples is not None:
            for row in rows:
                _append(self._samples, row)

    def saving(self, step: int) -> None:
        """Make the lines durable before the checkpoint is, so that a power cut leaves no checkpoint without the lines of its steps."""
        for stream in self._files:
            try:
                os.fsync(stream.fileno())
            except OSError as error:
                raise StorageError(f"{stream.name!s} could not be written: {error.strerror}.") from error

    def close(self) -> None:
        for stream in self._files:
            stream.close()

    def _continue(self, path: Path, step: int) -> FileIO:
        open_own(path, "a+b").close()  # refuses a link before anything is replaced
        kept = cut_back(path, step)
        if kept.unreadable:
            self.notes.append(f"{path}: unreadable lines, removed: {kept.unreadable:,}")
        if path.name == METRICS and kept.steps < step:  # a step may have no row in samples.jsonl
            self.notes.append(f"{path} has no line for {step - kept.steps:,} of the {step:,} steps up to here")
        stream: FileIO = open_own(path, "a+b")  # type: ignore[assignment]  # unbuffered: a kill loses at most the last line
        self._files.append(stream)
        return stream


@dataclass
class Kept:
    """What `cut_back` found in a file."""

    steps: int = 0  # with at least one line
    unreadable: int = 0  # lines that are complete, and are not ours


def cut_back(path: Path, step: int) -> Kept:
    """Keep the lines up to and including `step`; later ones will be written again. In bounded memory.

    Lines that cannot be read are removed, and counted. So is, uncounted, a last line that a kill left incomplete. The file is left alone if
    all of it is kept.
    """
    kept = Kept()
    if not path.is_file():
        return kept
    last, is_changed = 0, False
    for line, at in _lines(path):
        kept.unreadable += at is None and line.endswith(b"\n")
        is_kept = at is not None and at <= step
        if is_kept and at != last:
            kept.steps, last = kept.steps + 1, at or 0
        is_changed |= not is_kept
    if is_changed:
        with rewritten(path) as stream:
            stream.writelines(line for line, at in _lines(path) if at is not None and at <= step)
    return kept


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The readable rows of metrics.jsonl, one at a time."""
    for line, step in _lines(path):
        if step is not None:
            yield json.loads(line)


def _lines(path: Path) -> Iterator[tuple[bytes, int | None]]:
    """The lines of a file, each with its step, or with None if it is no complete line of ours. Of lines that are too long, the end."""
    with path.open("rb") as stream:
        is_too_long = False
        while line := stream.readline(_LONGEST_LINE):
            if line.endswith(b"\n") or len(line) < _LONGEST_LINE:
                yield line, None if is_too_long else _step(line)
            is_too_long = not line.endswith(b"\n")


def _step(line: bytes) -> int | None:
    """The step of a complete line of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step > 0 else None


def _append(stream: FileIO, row: Mapping[str, Any]) -> None:
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def write() -> None:
        nonlocal line
        while line:
            line = line[stream.write(line) :]

    try:
        until_written(Path(str(stream.name)), write)
    except OSError as error:
        raise StorageError(f"{stream.name!s} could not be written: {error.strerror}.") from error
