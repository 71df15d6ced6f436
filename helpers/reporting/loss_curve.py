"""The loss curve of a run as an image: every step, and a smooth running mean."""

from __future__ import annotations

import io
from array import array
from collections.abc import Sequence
from pathlib import Path

from helpers.reporting.records import METRICS, read_metrics
from helpers.storage.atomic import write_file

CURVE = "loss_curve.png"


def write_loss_curve(output_dir: Path) -> Path | None:
    """Draw metrics.jsonl as loss_curve.png; None for a run without steps."""
    steps, losses = array("q"), array("d")  # a run may have millions of steps
    for row in read_metrics(output_dir / METRICS):
        if isinstance(loss := row.get("loss"), float) and not row.get("skipped"):
            steps.append(row["step"])
            losses.append(loss)
    if not steps:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=110)
    axes = figure.add_axes((0.08, 0.11, 0.9, 0.85))  # fixed margins: a layout engine would draw everything twice
    axes.plot(steps, losses, linewidth=0.8, alpha=0.35, label="each step")
    axes.plot(steps, running_mean(losses, max(1, len(losses) // 20)), linewidth=2, label="running mean")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    write_file(output_dir / CURVE, encoded.getvalue())
    return output_dir / CURVE


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 values before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means
