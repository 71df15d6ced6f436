"""How long it takes to compute which samples a step consists of, for up to a hundred million samples.

    python -m benchmarks.order_at_scale [--rows 10000 1000000 100000000] [--rounds 5] [--folder /big/disk] [--profile]

A plan of synthetic rows is on disk and memory-mapped, like a real one: three datasets, fifty buckets, micro-batches of 4. The benchmark
measures the memory of the order itself (anonymous pages, without those of the mapped plan), building it, consecutive steps, the steps
around the end of an epoch, and jumps to random steps within a thousand epochs, as when a run resumes.

Some hundred micro-batches are computed at once. The step that does this is the slowest and has its own figure. Figures of steps are
medians of the rounds, in CPU time; otherwise the slowest of thousands of steps would show other work on the machine.
"""

from __future__ import annotations

import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Figure, conclude, parser, profile
from helpers.data.order.epoch_order import EpochOrder, Share
from helpers.data.plan.buckets import ROW

ROWS = (10**4, 10**6, 10**8)
SHAPES = 50
BATCH_SIZE = 4
SHARES = (Share(0, 2.0), Share(1, 1.0), Share(0, 1.0, ignore_epochs=True))
SIZES = (0.7, 0.2, 0.1)  # the three datasets' shares of all rows

MOST_MEGABYTES = {10**4: 5.0, 10**6: 80.0, 10**8: 500.0}
MOST_CHOOSING_US = 50.0
MOST_STRETCH_MS = 10.0
MOST_SEEKING_MS = 10.0
STEPS = 20_000
AROUND_THE_END = 500  # steps
JUMPS = 100


class Round(NamedTuple):
    """Seconds of CPU time: the mean step, the 99th percentile, the slowest step, the slowest at an epoch's end, the slowest jump."""

    mean: float
    usual: float
    slowest: float
    at_the_end: float
    jump: float


def write_plan(path: Path, rows: int, seed: int = 0) -> NDArray[np.void]:
    """A plan's columns, memory-mapped from disk: random buckets, some of them rare; one dataset after the other."""
    columns = np.lib.format.open_memmap(path, "w+", ROW, (rows,))
    random = np.random.default_rng(seed)
    ends = np.cumsum([round(rows * size) for size in SIZES])
    for start in range(0, rows, 10**6):
        part = columns[start : start + 10**6]
        part["shape"] = SHAPES * random.random(len(part)) ** 3
        part["dataset"] = np.searchsorted(ends[:-1], np.arange(start, start + len(part)), side="right")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def order_over(columns: NDArray[np.void]) -> EpochOrder:
    order = EpochOrder(columns["shape"], columns["dataset"], SHARES, BATCH_SIZE, seed=1)
    order.step(0)
    return order


def steps(order: EpochOrder, numbers: Sequence[int]) -> list[float]:
    """Seconds of CPU time to choose the samples of each step."""
    took = []
    for number in numbers:
        began = time.thread_time()
        order.step(number)
        took.append(time.thread_time() - began)
    return took


def measure(order: EpochOrder) -> Round:
    count = order.micro_batches_per_epoch
    along = sorted(steps(order, range(STEPS)))
    ends = steps(order, range(count - AROUND_THE_END, count + AROUND_THE_END))
    jumps = steps(order, [random.randrange(1000 * count) for _ in range(JUMPS)])
    return Round(sum(along) / STEPS, along[STEPS * 99 // 100], along[-1], max(ends), max(jumps))


def anonymous_bytes() -> int:
    """Bytes of this process's memory that are not backed by a file. Linux only."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)[0]) * 1024


def most_memory(work: Callable[[], EpochOrder]) -> tuple[EpochOrder, int]:
    """The result of `work`, and the peak growth of memory in bytes while it ran."""
    before, most, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(most, anonymous_bytes()) - before


def figures_of(rows: int, folder: Path, rounds: int) -> tuple[list[Figure], EpochOrder]:
    columns = write_plan(folder / "plan.npy", rows)
    began = time.perf_counter()
    order, memory = most_memory(lambda: order_over(columns))
    built = time.perf_counter() - began
    found = [measure(order) for _ in range(rounds)]
    usual = Round(*(statistics.median(values) for values in zip(*found, strict=True)))
    name = f"{rows:,} rows"
    return [
        Figure(f"{name}: memory", memory / 1e6, "MB", at_most=MOST_MEGABYTES.get(rows)),
        Figure("building, once per start", built, "s"),
        Figure("a step, on average", usual.mean * 1e6, "us", at_most=MOST_CHOOSING_US),
        Figure("99 of 100 steps", usual.usual * 1e6, "us", at_most=MOST_CHOOSING_US),
        Figure("the slowest step", usual.slowest * 1e3, "ms", at_most=MOST_STRETCH_MS),
        Figure("the slowest at an epoch's end", usual.at_the_end * 1e3, "ms", at_most=MOST_STRETCH_MS),
        Figure("the slowest of 100 jumps", usual.jump * 1e3, "ms", at_most=MOST_SEEKING_MS),
    ], order


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of the plans; 38 bytes each on disk")
    options.add_argument("--folder", type=Path, help="folder to write to (default: a temporary folder)")
    chosen = options.parse_args(arguments)
    figures: list[Figure] = []
    order_over(np.zeros(1000, ROW))  # NumPy's one-time memory does not belong to the order
    for rows in chosen.rows:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            more, order = figures_of(rows, Path(folder), chosen.rounds)
            figures += more
            if chosen.profile:
                profile(f"{STEPS:,} steps of {rows:,} rows", lambda order=order: steps(order, range(STEPS)))  # type: ignore[misc]
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
