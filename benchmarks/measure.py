"""Shared by the benchmarks: loops that alternate, tables of figures with their limits, profiles."""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

LEAST_ROUNDS = 5
PROFILED_LINES = 15
HEADINGS = ("", "figure", "limit", "ratio", "gate", "")


@dataclass(frozen=True)
class Figure:
    """One line of a benchmark's table.

    `limit` is the result of a bare loop in the same run, and `ratio` compares `value` with it. The gate (`at_least`, `at_most`) applies to
    the ratio if there is one, unless `gates_value`. A figure without a gate is only printed.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    gates_value: bool = False

    @property
    def kept(self) -> bool:
        judged = self.value if self.ratio is None or self.gates_value else self.ratio
        return (self.at_least is None or judged >= self.at_least) and (self.at_most is None or judged <= self.at_most)

    def cells(self) -> tuple[str, ...]:
        """Name, figure, limit, ratio, gate and verdict, formatted for the table."""
        unit = f" {self.unit}" if self.ratio is None or self.gates_value else ""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        gate = " ".join(f"{sign} {number(bound)}{unit}" for sign, bound in bounds if bound is not None)
        return (
            self.name,
            f"{number(self.value)} {self.unit}",
            "" if self.limit is None else f"{number(self.limit)} {self.unit}",
            "" if self.ratio is None else f"{self.ratio:.3f}",
            gate,
            "" if not gate else "ok" if self.kept else "MISSED",
        )


def compared(
    name: str,
    unit: str,
    rounds: Sequence[tuple[float, float]],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    gates_value: bool = False,
) -> Figure:
    """A figure from rounds of (bare loop, ours): the medians, and the median of the ratios of all rounds.

    Other work on the machine affects both loops of a round, so the ratio of a round is steadier than either figure.
    """
    bare, ours = (statistics.median(values) for values in zip(*rounds, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in rounds)
    return Figure(name, ours, unit, bare, ratio, at_least, at_most, gates_value)


def in_turns(rounds: int, first: Callable[[], T], second: Callable[[], T]) -> list[tuple[T, T]]:
    """The results of two loops that alternate: first, second, first, second ..."""
    return [(first(), second()) for _ in range(rounds)]


def number(value: float) -> str:
    """Three significant digits, with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(figures: Iterable[Figure]) -> str:
    rows = [HEADINGS, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for name, *numbers, verdict in rows:
        aligned = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=False))
        lines.append("  ".join([name.ljust(widths[0]), *aligned, verdict]).rstrip())
    return "\n".join(lines)


def conclude(figures: Sequence[Figure], rounds: int) -> int:
    """Print the table => the exit code: 1 if a gate is missed."""
    print(table(figures))
    print(f"medians of {rounds} alternating rounds; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return int(not all(figure.kept for figure in figures))


def profile(name: str, loop: Callable[[], object]) -> None:
    """Run a loop once more and print where its main thread spends its time."""
    profiler = cProfile.Profile()
    profiler.runcall(loop)
    print(f"\n--- profile: {name}")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(PROFILED_LINES)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options shared by benchmarks that compare loops."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help=f"alternating rounds (default {LEAST_ROUNDS})")
    options.add_argument("--profile", action="store_true", help="print the profiles of both loops afterwards")
    return options
