"""Shapes that are drawn and sizes that the user wants; computed targets are in test_buckets.py."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.config.aspects import AspectBucket, BucketSize
from helpers.data.base.sample import Size
from helpers.data.plan.targets import ResolutionRule, target_size, targets

WIDE, TALL = AspectBucket(1.5), AspectBucket(0.67)
DRAWN = ResolutionRule(crop=True, crop_aspect="random", aspect_buckets=(TALL, AspectBucket(1), WIDE))
HUGE = Size(6000, 6000)

edges = st.integers(200, 8000)
buckets = st.lists(st.builds(AspectBucket, st.floats(0.25, 4), st.floats(0.01, 100)), min_size=1, max_size=5).map(tuple)
drawing = st.builds(dataclasses.replace, st.just(DRAWN), aspect_buckets=buckets, resolution=st.floats(0.1, 2)) | st.builds(
    dataclasses.replace, st.just(DRAWN), aspect_buckets=buckets, resolution=st.integers(256, 1024), resolution_type=st.just("pixel")
)
fractions = st.floats(0, 1, exclude_max=True)


def shares(size: Size, rule: ResolutionRule, draws: int = 10_000) -> dict[str, float]:
    """How often each target is drawn for an image, over equally spaced draws."""
    u = (np.arange(draws) + 0.5) / draws
    width, height = targets(np.full(draws, size.width), np.full(draws, size.height), rule, u)
    drawn, counts = np.unique(np.stack([width, height]), axis=1, return_counts=True)
    return {str(Size(int(w), int(h))): count / draws for (w, h), count in zip(drawn.T, counts, strict=True)}


def test_drawn_shapes_come_as_often_as_their_weights_say_whatever_these_add_up_to() -> None:
    even = shares(HUGE, DRAWN)
    assert even.keys() == {"832x1216", "1024x1024", "1216x832"}
    assert all(abs(share - 1 / 3) < 1e-3 for share in even.values())
    weighted = dataclasses.replace(DRAWN, aspect_buckets=(AspectBucket(0.67, 1), AspectBucket(1.5, 3)))
    assert shares(HUGE, weighted) == {"832x1216": 0.25, "1216x832": 0.75}


def test_a_shape_that_would_enlarge_the_picture_is_not_drawn_while_another_would_not() -> None:
    assert shares(Size(3000, 900), DRAWN) == {"1216x832": 1.0}
    assert shares(Size(1216, 1100), DRAWN).keys() == {"1024x1024", "1216x832"}


def test_a_picture_that_every_shape_enlarges_draws_among_all() -> None:
    assert shares(Size(400, 400), DRAWN).keys() == shares(HUGE, DRAWN).keys()


@given(edges, edges, drawing, fractions)
def test_a_drawn_target_is_that_of_a_bucket_and_enlarges_only_where_all_would(
    width: int, height: int, rule: ResolutionRule, u: float
) -> None:
    preserving = dataclasses.replace(rule, crop_aspect="preserve")
    possible = {target_size(Size(round(10_000_000 * bucket.aspect), 10_000_000), preserving) for bucket in rule.aspect_buckets}
    drawn = target_size(Size(width, height), rule, u)
    assert drawn in possible
    covered = {target for target in possible if target.width <= width and target.height <= height}
    assert drawn in covered or not covered


@given(drawing)
def test_the_lowest_draw_is_the_first_shape_and_the_highest_the_last(rule: ResolutionRule) -> None:
    for u, bucket in ((0.0, rule.aspect_buckets[0]), (np.nextafter(1, 0), rule.aspect_buckets[-1])):
        alone = dataclasses.replace(rule, aspect_buckets=(bucket,))
        assert target_size(HUGE, rule, u) == target_size(HUGE, alone)


def test_the_users_size_takes_the_place_of_the_computed_one_of_its_rounded_aspect() -> None:
    rule = ResolutionRule(bucket_sizes=(BucketSize(1.46, 1152, 768),))
    assert target_size(Size(6000, 4000), rule) == Size(1152, 768)
    assert target_size(Size(4000, 6000), rule) == Size(832, 1216), "the upright one has an aspect of its own"
    assert target_size(Size(4000, 3000), rule) == Size(1152, 896)
    assert target_size(Size(6000, 4000), dataclasses.replace(rule, rounding=1)) == Size(1216, 832)
    coarse = dataclasses.replace(rule, rounding=1, bucket_sizes=(BucketSize(1.5, 1152, 768),))
    assert target_size(Size(6000, 4000), coarse) == Size(1152, 768)


def test_the_users_size_holds_for_squares_and_drawn_shapes_and_not_for_pixels() -> None:
    sizes = (BucketSize(1.0, 960, 960), BucketSize(1.46, 1152, 768))
    assert target_size(HUGE, ResolutionRule(crop=True, bucket_sizes=sizes)) == Size(960, 960)
    assert shares(HUGE, dataclasses.replace(DRAWN, bucket_sizes=sizes)).keys() == {"832x1216", "960x960", "1152x768"}
    assert target_size(HUGE, ResolutionRule(1024, "pixel", bucket_sizes=sizes)) == Size(1024, 1024)


def test_a_million_shapes_are_drawn_and_looked_up_in_about_a_second() -> None:
    random = np.random.default_rng(0)
    width, height = random.integers(300, 6000, (2, 1_000_000))
    started = time.process_time()
    targets(width, height, DRAWN, random.random(1_000_000))
    targets(width, height, ResolutionRule(bucket_sizes=(BucketSize(1.46, 1152, 768),)))
    assert time.process_time() - started < 5
