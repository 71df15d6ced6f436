"""metrics.jsonl and samples.jsonl: one JSON object per line. Each step appears once, however often the run was resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from helpers.errors import StorageError
from helpers.protocols import Reporter, StepResult
from helpers.storage.atomic import write_file

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class Records(Reporter):
    """Appends to the files in OUTPUT_DIR. A resumed run first removes the lines of later steps."""

    def __init__(self, output_dir: Path, resumed_at: int, record_samples: bool) -> None:
        self._files: list[FileIO] = []
        self._metrics = self._continue(output_dir / METRICS, resumed_at)
        self._samples = self._continue(output_dir / SAMPLES, resumed_at) if record_samples else None

    def stepped(self, result: StepResult) -> None:
        _append(self._metrics, {name: value for name, value in asdict(result).items() if value is not None})

    def sampled(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._samples is not None:
            for row in rows:
                _append(self._samples, row)

    def close(self) -> None:
        for stream in self._files:
            stream.close()

    def _continue(self, path: Path, step: int) -> FileIO:
        cut_back(path, step)
        stream = path.open("ab", buffering=0)  # unbuffered: each line is written at once, so a kill loses at most the last one
        self._files.append(stream)
        return stream


def cut_back(path: Path, step: int) -> None:
    """Keep the lines up to and including `step`; later ones will be written again. A line that a kill left incomplete is removed too."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        write_file(path, b"".join(kept))


def _append(stream: FileIO, row: Mapping[str, Any]) -> None:
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        written = stream.write(line)
    except OSError as error:
        raise StorageError(f"{stream.name!s} could not be written: {error.strerror}.") from error
    if written != len(line):
        raise StorageError(f"{stream.name!s} could not be written: the disk is full.")
