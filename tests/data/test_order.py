"""The order of an epoch, as properties that must hold for any dataset."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helpers.data.order.epoch_order import EpochOrder, MicroBatch, OrderStart, Share
from helpers.data.order.interleaving import GROUP_SIZE

REPEATS = (0, 2, 1)
MIXES: list[tuple[float | None, ...]] = [(None, None, None), (1, 1, 1), (0.7, 0.3, 0.05), (0, 3, 1), (None, 5, 0)]

samples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=60)  # (shape, dataset) of each
mixes = st.sampled_from(MIXES)


def order_of(
    rows: list[tuple[int, int]], batch_size: int = 3, seed: int = 1, mix: tuple[float | None, ...] = MIXES[0], fills: tuple[int, ...] = ()
) -> EpochOrder:
    shares = [Share(REPEATS[d], mix[d], d in fills) for d in range(3)]
    return EpochOrder([shape for shape, _ in rows], [dataset for _, dataset in rows], shares, batch_size, seed)


def of_sizes(sizes: list[int], shares: list[Share], shapes: int = 3, batch_size: int = 2, seed: int = 1) -> EpochOrder:
    """Datasets of so many samples each, in turn of each shape."""
    datasets = np.repeat(np.arange(len(sizes)), sizes)
    return EpochOrder(np.arange(len(datasets)) % shapes, datasets, shares, batch_size, seed)


def datasets_of(batches: list[MicroBatch], sizes: list[int]) -> list[int]:
    """The dataset of each micro-batch."""
    return np.searchsorted(np.cumsum(sizes), [batch.samples[0] for batch in batches], side="right").tolist()


def epoch(order: EpochOrder, number: int) -> list[MicroBatch]:
    count = order.micro_batches_per_epoch
    return [order.step(index)[0] for index in range(number * count, (number + 1) * count)]


def some_count(rows: list[tuple[int, int]], mix: tuple[float | None, ...], fills: tuple[int, ...] = ()) -> bool:
    """Whether there is a sample of a dataset that counts and has a probability above 0."""
    return any(dataset not in fills and mix[dataset] != 0 for _, dataset in rows)


@settings(max_examples=40, deadline=None)
@given(samples, st.integers(1, 9), st.integers(0, 5), mixes)
def test_every_sample_appears_exactly_repeats_plus_one_times_an_epoch(
    rows: list[tuple[int, int]], batch_size: int, number: int, mix: tuple[float | None, ...]
) -> None:
    assume(some_count(rows, mix))
    order = order_of(rows, batch_size, mix=mix)
    batches = epoch(order, number)
    seen = Counter(zip(np.concatenate([b.samples for b in batches]), np.concatenate([b.repeats for b in batches]), strict=True))
    assert seen == Counter((sample, repeat) for sample, (_, dataset) in enumerate(rows) for repeat in range(REPEATS[dataset] + 1))
    assert {batch.epoch for batch in batches} == {number}
    assert order.samples_per_epoch == sum(seen.values())


@given(samples, st.integers(1, 9))
def test_a_micro_batch_is_of_one_data_set_and_one_shape_and_one_of_them_may_be_short(rows: list[tuple[int, int]], batch_size: int) -> None:
    batches = epoch(order_of(rows, batch_size), 0)
    short: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        buckets = {rows[sample] for sample in batch.samples}
        assert len(buckets) == 1 and 1 <= len(batch.samples) <= batch_size
        if len(batch.samples) < batch_size:
            short.update(buckets)
    assert all(count == 1 for count in short.values())


@settings(max_examples=30, deadline=None)
@given(samples, st.integers(0, 5), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_same_step_holds_the_same_samples_at_the_same_places_on_any_number_of_processes(
    rows: list[tuple[int, int]], step: int, world_size: int
) -> None:
    order = order_of(rows)
    alone = order.step(step, accumulation=12)
    ranks = [order.step(step, rank, world_size, 12 // world_size) for rank in range(world_size)]
    shared = [batches[k] for k in range(12 // world_size) for batches in ranks]
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


@settings(max_examples=40, deadline=None)
@given(samples, st.integers(1, 5), st.integers(1, 30))
def test_starting_at_a_step_gives_what_an_unbroken_run_gives_there(rows: list[tuple[int, int]], accumulation: int, start: int) -> None:
    unbroken = order_of(rows)
    earlier = [unbroken.step(step, accumulation=accumulation) for step in range(start + 2)]
    resumed = order_of(rows)
    for step in (start, start + 1):
        now = resumed.step(step, accumulation=accumulation)
        assert [batch.samples.tolist() for batch in now] == [batch.samples.tolist() for batch in earlier[step]]


@settings(max_examples=40, deadline=None)
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
    order = of_sizes([5, 3], [Share(1, 2.0), Share(0, 1.0)], shapes=2)
    found = epoch(order, 0)
    assert [list(zip(batch.samples.tolist(), batch.repeats.tolist(), strict=True)) for batch in found] == EXPECTED
    large = EpochOrder(np.arange(10**5) % 3, np.zeros(10**5, np.int16), [Share()], 4, seed=42)  # through the network, not the tables
    assert [batch.samples.tolist() for batch in large.step(20_000, accumulation=2)] == EXPECTED_OF_MANY


EXPECTED = [[(4, 0), (0, 0)], [(7, 0), (5, 0)], [(4, 1), (0, 1)], [(2, 0), (2, 1)], [(6, 0)], [(3, 0), (1, 0)], [(3, 1), (1, 1)]]
EXPECTED_OF_MANY = [[70288, 68551, 65986, 22600], [22135, 19705, 79864, 69619]]


def test_micro_batches_of_a_shape_lie_next_to_each_other_in_groups() -> None:
    shapes = np.repeat(np.arange(4), 160)
    order = EpochOrder(shapes, np.zeros(640, int), [Share()], batch_size=2, seed=3)
    sequence = [shapes[batch.samples[0]] for batch in epoch(order, 0)]
    groups = np.array(sequence).reshape(-1, GROUP_SIZE)  # 80 micro-batches a shape: whole groups only
    assert (groups == groups[:, :1]).all()


def test_each_shape_has_its_share_at_the_start_and_at_the_end_of_an_epoch() -> None:
    """Taking shapes in turn would spend the rare ones first and leave the end of the epoch to one shape."""
    shapes = np.repeat([0, 1, 2], [6400, 1280, 320])
    order = EpochOrder(shapes, np.zeros(8000, int), [Share()], batch_size=1, seed=0)
    count = order.micro_batches_per_epoch
    sequence = np.array([shapes[order.step(index)[0].samples[0]] for index in range(count)])
    for part in (sequence[: count // 10], sequence[-count // 10 :]):
        groups = len(part) / GROUP_SIZE
        for shape, share in ((0, 0.8), (1, 0.16), (2, 0.04)):
            sigma = np.sqrt(share * (1 - share) / groups)
            assert abs((part == shape).mean() - share) < 3 * sigma


@settings(max_examples=40, deadline=None)
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
        EpochOrder(shapes, [0] * len(shapes), [Share()], batch_size, seed=0)


# -- several datasets --------------------------------------------------------------------------------------------------------


def test_data_sets_have_the_shares_asked_for_until_one_is_used_up_and_the_rest_is_even() -> None:
    sizes, weights = [4000, 3000, 2000], np.array([5.0, 2.0, 1.0])
    order = of_sizes(sizes, [Share(0, weight) for weight in weights])
    found = np.array(datasets_of(epoch(order, 0), sizes))
    used_up = int(np.flatnonzero(found == 0)[-1]) + 1
    assert abs(used_up - 2000 / (5 / 8)) < 3 * GROUP_SIZE  # 2,000 micro-batches of two at five in eight
    rest = len(found) - used_up
    remaining = np.array([0, 1500 - 2000 * 2 / 5, 1000 - 2000 / 5])
    for part, shares in (
        *((half, weights / 8) for half in halves(found[:used_up])),
        *((half, remaining / rest) for half in halves(found[used_up:])),
    ):
        for dataset, share in enumerate(shares):
            assert abs((part == dataset).mean() - share) <= 3 * np.sqrt(share * (1 - share) / len(part)) + 1e-9


def halves(found: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [found[: len(found) // 2], found[len(found) // 2 :]]


def test_data_sets_without_probabilities_are_even_over_the_whole_epoch() -> None:
    sizes = [6000, 600, 60]
    found = np.array(datasets_of(epoch(of_sizes(sizes, [Share()] * 3), 0), sizes))
    for tenth in np.array_split(found, 10):
        counts = np.bincount(tenth, minlength=3)
        assert (abs(counts - np.array([300, 30, 3])) <= 2 * GROUP_SIZE).all(), counts


def test_a_data_set_of_probability_0_waits_until_another_is_used_up() -> None:
    sizes = [200, 100, 50]
    found = datasets_of(epoch(of_sizes(sizes, [Share(0, 1), Share(0, 1), Share(0, 0)]), 0), sizes)
    last_of_the_shorter = max(i for i, dataset in enumerate(found) if dataset == 1)
    assert found.index(2) >= last_of_the_shorter - GROUP_SIZE


def test_a_bucket_has_its_share_of_any_window_of_its_data_set() -> None:
    shapes = np.repeat([0, 1, 2, 3], [30_000, 6_000, 3_000, 1_000])
    order = EpochOrder(shapes, np.zeros(40_000, int), [Share()], 1, seed=4)
    found = np.array([shapes[batch.samples[0]] for batch in epoch(order, 0)])
    for start in range(0, 40_000, 1000):
        counts = np.bincount(found[start : start + 1000], minlength=4)
        assert (abs(counts - [750, 150, 75, 25]) <= 2 * GROUP_SIZE).all(), counts


def test_a_data_set_that_fills_keeps_its_share_and_goes_on_where_it_stopped() -> None:
    sizes = [40, 100]
    order = of_sizes(sizes, [Share(0, 1), Share(0, 0.5, ignore_epochs=True)], shapes=2)
    assert order.micro_batches_per_epoch == 20 + 10 and order.samples_per_epoch == 40
    filled: list[int] = []
    for number in range(10):  # 10 epochs of 10 micro-batches of two: two whole passes over its 100 samples
        batches = epoch(order, number)
        counting = [sample for batch in batches for sample in batch.samples.tolist() if sample < 40]
        assert sorted(counting) == list(range(40))
        filled += [sample for batch in batches for sample in batch.samples.tolist() if sample >= 40]
    assert sorted(filled[:100]) == sorted(filled[100:]) == list(range(40, 140))


def test_a_data_set_that_fills_begins_again_within_an_epoch_when_it_is_small() -> None:
    sizes = [60, 4]
    order = of_sizes(sizes, [Share(0, 1), Share(0, 1, ignore_epochs=True)], shapes=1)
    appearances = [(sample, repeat) for b in epoch(order, 0) for sample, repeat in zip(b.samples.tolist(), b.repeats.tolist(), strict=True)]
    seen = Counter(sample for sample, _ in appearances)
    assert order.micro_batches_per_epoch == 60 and {seen[sample] for sample in range(60, 64)} == {15}
    assert len(set(appearances)) == len(appearances)  # so that each appearance has a caption drawn for itself


@settings(max_examples=30, deadline=None)
@given(samples, st.integers(0, 12), mixes, st.integers(0, 2))
def test_data_sets_that_fill_are_the_same_on_any_number_of_processes_and_after_any_start(
    rows: list[tuple[int, int]], step: int, mix: tuple[float | None, ...], filler: int
) -> None:
    assume(some_count(rows, mix, (filler,)))
    alone = order_of(rows, mix=mix, fills=(filler,))
    before = [alone.step(index, accumulation=4) for index in range(step + 1)][-1]
    others = order_of(rows, mix=mix, fills=(filler,))
    one, two = others.step(step, 0, 2, 2), others.step(step, 1, 2, 2)
    shared = [one[0], two[0], one[1], two[1]]
    assert [batch.samples.tolist() for batch in shared] == [batch.samples.tolist() for batch in before]
    assert [batch.places for batch in shared] == [batch.places for batch in before]


@pytest.mark.parametrize("shares", [[Share(0, 0.0)], [Share(ignore_epochs=True)], [Share(0, 0.0), Share(0, 1.0, ignore_epochs=True)]])
def test_an_epoch_that_nothing_would_end_is_refused(shares: list[Share]) -> None:
    with pytest.raises(ValueError, match="dataset without ignore_epochs whose probability is above 0"):
        EpochOrder([0] * len(shares), list(range(len(shares))), shares, 1, seed=0)


# -- shapes that differ between epochs ------------------------------------------------------------------------------------------


def of_changing_shapes(batch_size: int = 4) -> EpochOrder:
    """Three datasets of thirty samples in all, whose shapes are drawn anew each epoch, so that epochs differ in their micro-batches."""
    datasets = np.repeat([0, 1, 2], [18, 7, 5])
    shares = [Share(1, 1.0), Share(0, 0.5), Share(0, 0.5, ignore_epochs=True)]
    return EpochOrder(lambda number: np.random.default_rng(number).integers(0, 2 + 2 * number, 30), datasets, shares, batch_size, seed=1)


def test_shapes_may_differ_between_epochs_and_each_epoch_is_whole() -> None:
    order = of_changing_shapes()
    counts = [order.micro_batches(number, number + 1) for number in range(5)]
    assert len(set(counts)) > 1 and order.micro_batches(0, 5) == sum(counts) and counts[0] == order.micro_batches_per_epoch
    found = [order.step(step)[0] for step in range(sum(counts))]
    for number, count in enumerate(counts):
        batches = [batch for batch in found if batch.epoch == number]
        shapes = np.random.default_rng(number).integers(0, 2 + 2 * number, 30)
        assert len(batches) == count and all(len({int(shapes[sample]) for sample in batch.samples}) == 1 for batch in batches)
        seen = Counter(sample for batch in batches for sample in batch.samples.tolist() if sample < 25)
        assert seen == Counter({sample: 2 if sample < 18 else 1 for sample in range(25)})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 15), st.integers(1, 5), st.integers(0, 6), st.integers(0, 4))
def test_a_start_in_the_middle_of_changing_epochs_gives_what_an_unbroken_run_gives(
    step: int, per_step: int, begun: int, number: int
) -> None:
    start = OrderStart(begun, number)
    unbroken = of_changing_shapes()
    along = [unbroken.step(index, accumulation=per_step, start=start) for index in range(begun, begun + step + 1)]
    resumed = of_changing_shapes()
    now = resumed.step(begun + step, accumulation=per_step, start=start)
    assert [(batch.epoch, batch.samples.tolist()) for batch in now] == [(batch.epoch, batch.samples.tolist()) for batch in along[-1]]
    assert along[0][0].epoch == number
    assert resumed.untouched_epoch(begun + step + 1, per_step, start) == now[-1].epoch + 1


def test_shapes_of_another_number_of_samples_are_refused() -> None:
    order = EpochOrder(lambda number: [0] * (3 - number), [0] * 3, [Share()], 1, seed=0)
    with pytest.raises(ValueError, match="one shape for each of the 3 samples, not 2"):
        order.step(3)
