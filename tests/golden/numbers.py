"""What is kept of a golden run, and how two such records are compared.

A record has three parts: the lines of `samples.jsonl`, the numbers of each step, and a summary of each trained tensor at the end:
its number of elements, its norm, and PROJECTIONS sums of its elements with fixed random signs. If a tensor changes by d, the root mean
square of the changes of these sums is |d| on average, so a few numbers show a change of any element.

A tensor may change by TOLERANCE of its norm. Some tensors begin at zero (B of a LoRA, the biases of norms): they hold nothing but the
sum of a few gradients, whose last bits differ between processors by 1e-5 of the whole, and the gradient of a key's bias is zero but for
rounding. So a tensor whose elements are small for its file is given the norm it would have with elements of the file's usual size (their
root mean square). A wrong draw, rate or average changes such tensors by far more.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

TOLERANCE = 1e-6  # of a loss, relative; of a tensor, relative to its norm
PROJECTIONS = 3
# Tolerances of the numbers of a step. The gradient of a LoRA passes through B, which is nearly zero, so its norm is less exact.
STEP_NUMBERS: Mapping[str, float] = {"loss": TOLERANCE, "grad_norm": 1e-5, "learning_rate": 1e-9}
LEFT_OUT = re.compile(r"^optimizer\.|\.kohya\.")  # shown by the weights of later steps; the same weights in another layout

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """The numbers of one run. weights: {file in the checkpoint: {tensor: [elements, norm, projections ...]}}."""

    samples: Rows
    steps: Rows
    weights: Mapping[str, Mapping[str, list[float]]]


def measure(output: Path) -> Record:
    """The record of a finished run, from its output folder."""
    [*_, last] = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    files = {path.relative_to(last).as_posix(): path for path in sorted(last.rglob("*.safetensors")) if not LEFT_OUT.search(path.name)}
    steps = [{name: row[name] for name in ("step", *STEP_NUMBERS)} for row in _read_rows(output / "metrics.jsonl")]
    return Record(
        samples=[_rounded(row) for row in _read_rows(output / "samples.jsonl")],
        steps=[_rounded(row) for row in steps],
        weights={name: {key: _summary(key, tensor) for key, tensor in sorted(load_file(path).items())} for name, path in files.items()},
    )


def write_record(record: Record, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text(_as_lines(record.samples), encoding="utf-8")
    (folder / "steps.jsonl").write_text(_as_lines(record.steps), encoding="utf-8")
    rows = [row for file, tensors in record.weights.items() for row in ([file], *([name, *value] for name, value in tensors.items()))]
    (folder / "weights.jsonl").write_text(_as_lines(rows), encoding="utf-8")


def read_record(folder: Path) -> Record:
    """The record in a folder. In weights.jsonl a file's name stands alone, before the lines of its tensors."""
    weights: dict[str, dict[str, list[float]]] = {}
    file = ""
    for name, *summary in _read_rows(folder / "weights.jsonl"):
        if summary:
            weights[file][name] = summary
        else:
            file, weights[name] = name, {}
    return Record(_read_rows(folder / "samples.jsonl"), _read_rows(folder / "steps.jsonl"), weights)


def differences(recorded: Record, measured: Record) -> Iterator[str]:
    """One sentence for each difference beyond the tolerance, in the order in which a run makes these numbers."""
    yield from _different_samples(recorded.samples, measured.samples)
    yield from _different_steps(recorded.steps, measured.steps)
    yield from _different_weights(recorded.weights, measured.weights)


def _different_samples(recorded: Rows, measured: Rows) -> Iterator[str]:
    if len(recorded) != len(measured):
        yield f"samples.jsonl has {len(measured)} rows, recorded are {len(recorded)}"
    for one, other in zip(recorded, measured, strict=False):
        place = f"step {one['step']}, place {one['place']}"
        for key in one | other:
            before, after = one.get(key, "nothing"), other.get(key, "nothing")
            if key == "loss":
                yield from _different_number(f"{place}: the sample's loss", before, after)
            elif before != after:
                yield f"{place}: {key} is {after!r}, recorded is {before!r}"


def _different_steps(recorded: Rows, measured: Rows) -> Iterator[str]:
    if len(recorded) != len(measured):
        yield f"metrics.jsonl has {len(measured)} steps, recorded are {len(recorded)}"
    for one, other in zip(recorded, measured, strict=False):
        for name, tolerance in STEP_NUMBERS.items():
            yield from _different_number(f"step {one['step']}: {name}", one[name], other[name], tolerance)


def _different_weights(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[str]:
    for file in sorted(recorded.keys() | measured.keys()):
        one, other = recorded.get(file, {}), measured.get(file, {})
        if one.keys() != other.keys():
            yield f"{file}: missing tensors {sorted(one.keys() - other.keys())}, new tensors {sorted(other.keys() - one.keys())}"
        usual = usual_size(one)
        for name in sorted(one.keys() & other.keys()):
            change = relative_change(one[name], other[name], usual)
            if not change <= TOLERANCE:
                yield f"{file}, tensor {name}: changed by {change:.1e} of its norm {one[name][1]:.3g}"


def usual_size(tensors: Mapping[str, list[float]]) -> float:
    """The root mean square of all elements of a file."""
    return math.sqrt(sum(norm**2 for _, norm, *_ in tensors.values()) / sum(elements for elements, *_ in tensors.values()))


def relative_change(recorded: list[float], measured: list[float], usual: float) -> float:
    """|d| / |tensor| as its summaries show it, where |tensor| is at least that of a tensor of elements of the `usual` size."""
    elements, norm, *projections = (after - before for before, after in zip(recorded, measured, strict=True))
    if elements:
        return math.inf
    size = max(abs(norm), math.sqrt(sum(value**2 for value in projections) / PROJECTIONS))
    return size / max(recorded[1], usual * math.sqrt(recorded[0]))


def _different_number(what: str, recorded: float, measured: float, tolerance: float = TOLERANCE) -> Iterator[str]:
    if not abs(measured - recorded) <= tolerance * abs(recorded):
        yield f"{what} is {measured:.9g}, recorded is {recorded:.9g}, off by {abs(measured - recorded) / (abs(recorded) or 1):.1e}"


def _summary(name: str, tensor: np.ndarray[Any, Any]) -> list[float]:
    values = tensor.astype(np.float64).ravel()
    numbers = [float(np.linalg.norm(values)), *(float(signs @ values) for signs in _signs(name, values.size))]
    return [values.size, *map(_digits, numbers)]


def _signs(name: str, size: int) -> Iterator[np.ndarray[Any, Any]]:
    """PROJECTIONS vectors of random signs, which depend on the name and the size alone."""
    for number in range(PROJECTIONS):
        stream = hashlib.shake_256(f"{name} {number}".encode()).digest(-(-size // 8))
        yield 2.0 * np.unpackbits(np.frombuffer(stream, np.uint8))[:size] - 1.0


def _digits(value: float) -> float:
    return float(f"{value:.8g}")


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _digits(value) if name in STEP_NUMBERS and value is not None else value for name, value in row.items()}


def _read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _as_lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
