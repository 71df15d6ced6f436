"""The order of an epoch, as properties that must hold for any data set."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.data.order import GROUP_SIZE, EpochOrder, MicroBatch, OrderStart

samples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=60)  # (shape, repeats) of each


def order_of(rows: list[tuple[int, int]], batch_size: int = 3, seed: int = 1) -> EpochOrder:
    return EpochOrder([shape for shape, _ in rows], [repeats for _, repeats in rows], batch_size, seed)


def epoch(order: EpochOrder, number: int) -> list[MicroBatch]:
    count = order.micro_batches_per_epoch
    return [order.step(index)[0] for index in range(number * count, (number + 1) * count)]


@given(samples, st.integers(1, 9), st.integers(0, 5))
def test_every_sample_appears_exactly_repeats_plus_one_times_an_epoch(rows: list[tuple[int, int]], batch_size: int, number: int) -> None:
    batches = epoch(order_of(rows, batch_size), number)
    seen = Counter(zip(np.concatenate([b.samples for b in batches]), np.concatenate([b.repeats for b in batches]), strict=True))
    assert seen == Counter((sample, repeat) for sample, (_, repeats) in enumerate(rows) for repeat in range(repeats + 1))
    assert {batch.epoch for batch in batches} == {number}


@given(samples, st.integers(1, 9))
def test_a_micro_batch_has_one_shape_and_only_the_last_of_a_shape_is_short(rows: list[tuple[int, int]], batch_size: int) -> None:
    batches = epoch(order_of(rows, batch_size), 0)
    short: Counter[int] = Counter()
    for batch in batches:
        shapes = {rows[sample][0] for sample in batch.samples}
        assert len(shapes) == 1 and 1 <= len(batch.samples) <= batch_size
        if len(batch.samples) < batch_size:
            short.update(shapes)
    assert all(count == 1 for count in short.values())


@given(samples, st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_same_step_holds_the_same_samples_at_the_same_places_on_any_number_of_processes(
    rows: list[tuple[int, int]], step: int, world_size: int
) -> None:
    order = order_of(rows)
    alone = order.step(step, accumulation=12)
    shared = [
        batch
        for k in range(12 // world_size)
        for rank in range(world_size)
        for batch in [order.step(step, rank, world_size, 12 // world_size)[k]]
    ]
    for one, other in zip(alone, shared, strict=True):
        assert one.samples.tolist() == other.samples.tolist()
        assert one.repeats.tolist() == other.repeats.tolist()
        assert (one.places, one.step_samples, one.epoch) == (other.places, other.step_samples, other.epoch)


@given(samples, st.integers(0, 40), st.integers(1, 8))
def test_places_number_the_samples_of_a_step_without_gaps(rows: list[tuple[int, int]], step: int, accumulation: int) -> None:
    batches = order_of(rows).step(step, accumulation=accumulation)
    places = [place for batch in batches for place in batch.places]
    assert places == list(range(batches[0].step_samples))
    assert all(len(batch.places) == len(batch.samples) and batch.step_samples == len(places) for batch in batches)


@given(samples, st.integers(1, 5), st.integers(1, 30))
def test_starting_at_a_step_gives_what_an_unbroken_run_gives_there(rows: list[tuple[int, int]], accumulation: int, start: int) -> None:
    unbroken = order_of(rows)
    earlier = [unbroken.step(step, accumulation=accumulation) for step in range(start + 2)]
    resumed = order_of(rows)
    for step in (start, start + 1):
        now = resumed.step(step, accumulation=accumulation)
        assert [batch.samples.tolist() for batch in now] == [batch.samples.tolist() for batch in earlier[step]]


@given(samples, st.integers(1, 5))
def test_steps_run_on_across_the_end_of_an_epoch(rows: list[tuple[int, int]], accumulation: int) -> None:
    order = order_of(rows)
    steps = 2 * order.micro_batches_per_epoch
    along = [batch.samples.tolist() for step in range(steps) for batch in order.step(step, accumulation=accumulation)]
    one_by_one = [order.step(index)[0].samples.tolist() for index in range(steps * accumulation)]
    assert along == one_by_one


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    rows = [(0, 0)] * 50 + [(1, 0)] * 50
    first = [batch.samples.tolist() for batch in epoch(order_of(rows), 0)]
    assert first == [batch.samples.tolist() for batch in epoch(order_of(rows), 0)]
    assert first != [batch.samples.tolist() for batch in epoch(order_of(rows), 1)]
    assert first != [batch.samples.tolist() for batch in epoch(order_of(rows, seed=2), 0)]


def test_the_order_is_what_it_was_in_earlier_versions() -> None:
    """A run that is resumed under a newer version must go on in the same order: this list may never change."""
    order = EpochOrder([0, 0, 0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0], batch_size=2, seed=42)
    found = [order.step(step)[0] for step in range(order.micro_batches_per_epoch)]
    assert [list(zip(batch.samples.tolist(), batch.repeats.tolist(), strict=True)) for batch in found] == EXPECTED


EXPECTED = [[(5, 0), (6, 0)], [(3, 0), (4, 0)], [(1, 0), (1, 1)], [(0, 0), (7, 0)], [(2, 0)]]


def test_micro_batches_of_a_shape_lie_next_to_each_other_in_groups() -> None:
    shapes = np.repeat(np.arange(4), 160)
    order = EpochOrder(shapes, np.zeros(640), batch_size=2, seed=3)
    sequence = [shapes[batch.samples[0]] for batch in epoch(order, 0)]
    groups = np.array(sequence).reshape(-1, GROUP_SIZE)  # 80 micro-batches a shape: whole groups only
    assert (groups == groups[:, :1]).all()


def test_each_shape_has_its_share_at_the_start_and_at_the_end_of_an_epoch() -> None:
    """Taking shapes in turn would spend the rare ones first and leave the end of the epoch to one shape."""
    shapes = np.repeat([0, 1, 2], [6400, 1280, 320])
    order = EpochOrder(shapes, np.zeros(8000), batch_size=1, seed=0)
    count = order.micro_batches_per_epoch
    sequence = np.array([shapes[order.step(index)[0].samples[0]] for index in range(count)])
    for part in (sequence[: count // 10], sequence[-count // 10 :]):
        groups = len(part) / GROUP_SIZE
        for shape, share in ((0, 0.8), (1, 0.16), (2, 0.04)):
            sigma = np.sqrt(share * (1 - share) / groups)
            assert abs((part == shape).mean() - share) < 3 * sigma


def test_a_million_samples_are_sought_in_under_ten_milliseconds() -> None:
    order = EpochOrder(np.arange(10**6) % 20, np.zeros(10**6), batch_size=4, seed=0)
    order.step(0, accumulation=4)  # builds the epoch
    started = time.perf_counter()
    for step in range(0, 60000, 3000):
        order.step(step, accumulation=4)
    assert (time.perf_counter() - started) / 20 < 0.010


@given(samples, st.integers(1, 4), st.integers(0, 30), st.integers(0, 5))
def test_an_order_that_begins_later_begins_with_a_whole_epoch(rows: list[tuple[int, int]], per_step: int, step: int, number: int) -> None:
    order = order_of(rows)
    start = OrderStart(step, number)
    end = step + 3
    later = [batch for index in range(step, end) for batch in order.step(index, accumulation=per_step, start=start)]
    plain = (batch for index in itertools.count(number) for batch in epoch(order, index))
    for one, other in zip(later, plain, strict=False):
        assert one.epoch == other.epoch and (one.samples == other.samples).all() and (one.repeats == other.repeats).all()
    assert order.untouched_epoch(step, per_step, start) == number
    assert order.untouched_epoch(end, per_step, start) == later[-1].epoch + 1


@pytest.mark.parametrize(("shapes", "batch_size"), [([], 1), ([0], 0)])
def test_an_order_of_nothing_is_refused(shapes: list[int], batch_size: int) -> None:
    with pytest.raises(ValueError, match="needs samples"):
        EpochOrder(shapes, [0] * len(shapes), batch_size, seed=0)
