"""Learning rates against the formulas of the documentation."""

from __future__ import annotations

import math

import pytest

from helpers.config.options import ScheduleOptions
from helpers.training.schedules import Schedule

L, E, W, N = 1e-3, 1e-5, 10, 110


def schedule(name: str, **more: float) -> Schedule:
    return Schedule(name=name, rate=L, floor=E, warmup_steps=W, total_steps=N, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_warm_up_rises_in_equal_steps_to_the_peak(name: str) -> None:
    rates = [schedule(name)(step) for step in range(W)]
    assert rates == pytest.approx([L * (step + 1) / W for step in range(W)])
    assert schedule(name)(W) == pytest.approx(L)


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        ("constant", L, L),
        ("constant_with_warmup", L, L),
        ("linear", (L + E) / 2, E),
        ("cosine", (L + E) / 2, E),
        ("polynomial", E + (L - E) * 0.5**0.8, E),
    ],
)
def test_middle_and_end_of_the_run(name: str, middle: float, end: float) -> None:
    rates = schedule(name, power=0.8)
    assert rates(60) == pytest.approx(middle)
    assert rates(N) == pytest.approx(end)
    assert rates(N + 50) == pytest.approx(end)


def test_restarts_begin_at_the_peak_again() -> None:
    rates = schedule("cosine_with_restarts", cycles=2)
    assert rates(60) == pytest.approx(L)
    assert rates(59) == pytest.approx(E + (L - E) * (1 + math.cos(math.pi * 0.98)) / 2)


def test_sine_starts_at_its_floor_and_peaks_every_two_warm_ups() -> None:
    rates = schedule("sine")
    assert [rates(step) for step in (0, W, 2 * W, 3 * W)] == pytest.approx([E, L, E, L])


def test_constant_knows_no_warm_up() -> None:
    assert schedule("constant")(0) == L


FORMULAS = {  # of p, how far the run is from the end of the warm-up to its own
    "linear": lambda p: L + (E - L) * p,
    "cosine": lambda p: E + (L - E) * (1 + math.cos(math.pi * p)) / 2,
    "cosine_with_restarts": lambda p: E + (L - E) * (1 + math.cos(math.pi * (3 * p % 1))) / 2,
    "polynomial": lambda p: E + (L - E) * (1 - p) ** 2.5,
    "constant_with_warmup": lambda p: L,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_step_has_the_rate_of_the_formula(name: str) -> None:
    rates = schedule(name, cycles=3, power=2.5)
    assert [rates(step) for step in range(W, N)] == pytest.approx([FORMULAS[name]((step - W) / (N - W)) for step in range(W, N)])


def test_every_step_of_the_sine_has_the_rate_of_the_formula() -> None:
    rates = schedule("sine")
    assert [rates(step) for step in range(N)] == pytest.approx([E + (L - E) * (1 - math.cos(math.pi * step / W)) / 2 for step in range(N)])


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (100, 10), (3000, 100)])
def test_a_short_run_has_a_short_warm_up_unless_the_user_sets_it(steps: int, warmup: int) -> None:
    assert Schedule.create(ScheduleOptions(), steps).warmup_steps == warmup
    assert Schedule.create(ScheduleOptions(lr_warmup_steps=7), steps).warmup_steps == 7
    assert Schedule.create(ScheduleOptions(lr_scheduler="sine"), steps).warmup_steps == 500


def test_the_mean_rate_is_that_of_all_steps() -> None:
    """A LoRA of 100 steps on the old defaults (sine, half a period of 500) has 4 % of its learning rate; on the new ones, 95 %."""
    sine = Schedule.create(ScheduleOptions(learning_rate=1e-4, lr_scheduler="sine"), 100)
    assert sine.mean == pytest.approx(sum(map(sine, range(100))) / 100) and 0.03 < sine.mean / 1e-4 < 0.05
    usual = Schedule.create(ScheduleOptions(learning_rate=1e-4), 100)
    assert usual.mean == pytest.approx((90 + sum(range(1, 11)) / 10) / 100 * 1e-4)
    long = Schedule.create(ScheduleOptions(learning_rate=1e-4, lr_scheduler="cosine", lr_end=0), 10**7)
    assert long.mean == pytest.approx(0.5e-4, rel=0.01)
