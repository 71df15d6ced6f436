from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.data.base.sample import Size
from helpers.data.plan.buckets import BucketPlan, DatasetColumns, geometry, plan
from helpers.data.plan.targets import ResolutionRule, target_size, unsuitable_size

edges = st.integers(1, 20_000)
sizes = st.tuples(edges, edges).filter(lambda size: max(size) <= 50 * min(size)).map(lambda size: Size(*size))
ordinary = st.tuples(st.integers(64, 9000), st.integers(64, 9000)).filter(lambda s: max(s) <= 3 * min(s)).map(lambda s: Size(*s))
rules = st.builds(
    ResolutionRule,
    resolution=st.floats(0.05, 4),
    alignment=st.sampled_from([8, 16, 64]),
    crop=st.booleans(),
    crop_style=st.sampled_from(["center", "corner", "random"]),
    crop_aspect=st.sampled_from(["square", "preserve"]),
) | st.builds(
    ResolutionRule,
    resolution=st.integers(64, 2048),
    resolution_type=st.just("pixel"),
    alignment=st.sampled_from([8, 64]),
    crop=st.booleans(),
)
fractions = st.floats(0, 1, exclude_max=True)
SQUARE = ResolutionRule(minimum_image_size=0.25, crop=True)


def columns(dataset: str, sizes: list[Size], rule: ResolutionRule = ResolutionRule(), **draws: object) -> DatasetColumns:  # noqa: B008
    width, height = (np.array(edge, np.int64) for edge in zip(*sizes, strict=True)) if sizes else (np.zeros(0, np.int64),) * 2
    return DatasetColumns(dataset, rule, np.arange(len(sizes)), width, height, **draws)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "megapixels", "target"),
    [
        ((1000, 1000), 1.0, "1024x1024"),
        ((1500, 1000), 1.0, "1216x832"),
        ((1000, 1500), 1.0, "832x1216"),
        ((1920, 1080), 1.0, "1344x768"),
        ((1080, 1920), 1.0, "768x1344"),
        ((4000, 3000), 1.0, "1152x896"),
        ((77, 77), 0.25, "512x512"),
        ((2000, 2000), 0.5, "704x704"),
    ],
)
def test_area_gives_the_known_sizes(size: tuple[int, int], megapixels: float, target: str) -> None:
    assert str(target_size(Size(*size), ResolutionRule(megapixels))) == target


@pytest.mark.parametrize(
    ("size", "edge", "target"),
    [((3000, 2000), 1024, "1536x1024"), ((2000, 3000), 1024, "1024x1536"), ((500, 500), 512, "512x512"), ((1920, 1080), 512, "896x512")],
)
def test_pixel_resolution_is_the_shorter_edge(size: tuple[int, int], edge: int, target: str) -> None:
    assert str(target_size(Size(*size), ResolutionRule(edge, "pixel"))) == target


@given(sizes, rules)
def test_targets_are_aligned_and_turn_with_the_image(size: Size, rule: ResolutionRule) -> None:
    target = target_size(size, rule)
    assert target.width % rule.alignment == target.height % rule.alignment == 0
    assert min(target) >= rule.alignment
    assert target_size(Size(size.height, size.width), rule) == Size(target.height, target.width)


@given(sizes, st.sampled_from([8, 64]), st.floats(0.05, 4))
def test_each_edge_is_the_nearest_multiple_to_the_exact_one(size: Size, alignment: int, megapixels: float) -> None:
    target = target_size(size, ResolutionRule(megapixels, alignment=alignment))
    for edge, other, got in ((size.width, size.height, target.width), (size.height, size.width, target.height)):
        exact = (megapixels * 1e6 * edge / other) ** 0.5
        assert abs(got - exact) <= alignment / 2 + 1e-6 or got == alignment


@given(sizes, rules, fractions, fractions)
def test_the_resized_image_just_covers_its_target_and_the_cut_lies_inside(size: Size, rule: ResolutionRule, u: float, v: float) -> None:
    cut = geometry(size, rule, u, v)
    spare_width, spare_height = cut.resized.width - cut.target.width, cut.resized.height - cut.target.height
    assert 0 <= cut.left <= spare_width and 0 <= cut.top <= spare_height
    assert min(spare_width, spare_height) == 0, "a smaller image would cover the target too"
    # Aspect is kept to the rounding of the one edge that follows.
    scale = max(cut.target.width / size.width, cut.target.height / size.height)
    assert abs(cut.resized.width - size.width * scale) <= 0.5 + 1e-6
    assert abs(cut.resized.height - size.height * scale) <= 0.5 + 1e-6


@given(ordinary)
def test_little_is_cut_away_from_ordinary_pictures_at_one_megapixel(size: Size) -> None:
    cut = geometry(size, ResolutionRule(1.0))
    assert 1 - cut.target.area / cut.resized.area < 0.10
    finely = geometry(size, ResolutionRule(1.0, alignment=8))
    assert 1 - finely.target.area / finely.resized.area < 0.02


@given(sizes, fractions, fractions)
def test_without_crop_the_cut_is_central_whatever_the_style_says(size: Size, u: float, v: float) -> None:
    cut = geometry(size, ResolutionRule(1.0, crop_style="random"), u, v)
    assert cut.left == (cut.resized.width - cut.target.width) // 2
    assert cut.top == (cut.resized.height - cut.target.height) // 2


def test_crop_styles_place_the_cut() -> None:
    size = Size(4000, 3000)

    def at(style: str, u: float = 0.0, v: float = 0.0, aspect: str = "square") -> tuple[int, int, str]:
        rule = ResolutionRule(1.0, crop=True, crop_style=style, crop_aspect=aspect)  # type: ignore[arg-type]
        cut = geometry(size, rule, u, v)
        return cut.top, cut.left, str(cut.target)

    assert geometry(size, ResolutionRule(1.0, crop=True)).resized == Size(1365, 1024)
    assert at("center") == (0, 170, "1024x1024")
    assert at("corner") == (0, 341, "1024x1024")
    assert at("random") == (0, 0, "1024x1024")
    assert at("random", u=0.5) == (0, 171, "1024x1024")
    assert at("random", u=np.nextafter(1, 0)) == (0, 341, "1024x1024")
    assert at("center", aspect="preserve") == (0, 21, "1152x896")


def test_random_cuts_reach_every_position_equally_often() -> None:
    rule = ResolutionRule(0.25, alignment=64, crop=True)
    u = (np.arange(3420) + 0.5) / 3420
    lefts = plan([columns("a", [Size(4000, 3000)] * len(u), rule, crop_u=u, crop_v=u)]).columns["left"]
    counts = np.bincount(lefts)
    assert len(counts) == 683 - 512 + 1
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("size", "rule", "reason"),
    [
        ((512, 512), ResolutionRule(512, "pixel", minimum_image_size=512), None),
        ((2000, 511), ResolutionRule(512, "pixel", minimum_image_size=512), "below 512 px: 2000x511"),
        ((500, 500), ResolutionRule(minimum_image_size=0.25), None),
        ((499, 500), ResolutionRule(minimum_image_size=0.25), "below 0.25 megapixels: 499x500"),
        ((2000, 300), ResolutionRule(minimum_image_size=0.25), None),
        ((2000, 300), ResolutionRule(minimum_image_size=0.25, crop=True, crop_aspect="preserve"), None),
        ((2000, 300), SQUARE, "below 0.25 megapixels: 2000x300, whose largest square is smaller"),
        ((1, 1), ResolutionRule(), None),
        ((5001, 100), ResolutionRule(), "too narrow: 5001x100, one side is more than 50 times the other"),
    ],
)
def test_the_minimum_size_is_judged_on_the_original(size: tuple[int, int], rule: ResolutionRule, reason: str | None) -> None:
    assert unsuitable_size(Size(*size), rule) == reason


@given(st.lists(sizes, min_size=1, max_size=12), rules, st.data())
def test_a_plan_holds_every_image_cut_as_if_it_were_alone(images: list[Size], rule: ResolutionRule, data: st.DataObject) -> None:
    u, v = (np.array(data.draw(st.lists(fractions, min_size=len(images), max_size=len(images)))) for _ in range(2))
    flip = np.arange(len(images)) % 2 == 0
    both = plan([columns("first", images, rule, crop_u=u, crop_v=v, flip=flip), columns("second", [Size(300, 200)])])
    assert len(both) == len(images) + 1
    for index, size in enumerate(images):
        cut = both.geometry(index)
        assert cut == geometry(size, rule, u[index], v[index], bool(flip[index]))
        assert bool(both.columns["upscaled"][index]) == (cut.resized.area > size.area)
    assert both.columns["row"].tolist() == [*range(len(images)), 0]
    assert both.columns["dataset"].tolist() == [0] * len(images) + [1]
    assert list(both.shapes) == sorted({both.geometry(index).target for index in range(len(both))})


def test_the_fingerprint_tells_any_cut_but_not_how_the_catalogue_numbers_rows() -> None:
    base = columns("a", [Size(640, 480), Size(300, 900)])
    same = dataclasses.replace(base, rows=base.rows + 7)
    assert plan([base]).fingerprint() == plan([same]).fingerprint()
    others = [
        plan([dataclasses.replace(base, dataset="b")]),
        plan([dataclasses.replace(base, rule=ResolutionRule(0.5))]),
        plan([dataclasses.replace(base, flip=np.array([True, False]))]),
        plan([columns("a", [Size(640, 480)])]),
        plan([columns("a", [Size(300, 900), Size(640, 480)])]),
        plan([columns("a", [Size(640, 481), Size(300, 900)])]),
    ]
    assert len({plan([base]).fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1


def test_a_plan_survives_being_kept_as_plain_arrays() -> None:
    made = plan([columns("a", [Size(640, 480), Size(300, 900)])])
    again = BucketPlan(made.datasets, made.shapes, np.frombuffer(made.columns.tobytes(), made.columns.dtype))
    assert again.fingerprint() == made.fingerprint()
    assert again.geometry(1) == made.geometry(1)


def test_a_plan_of_nothing_is_empty() -> None:
    assert len(plan([])) == len(plan([columns("a", [])])) == 0


def test_random_cuts_without_draws_are_a_bug() -> None:
    with pytest.raises(ValueError, match="'a' crops at random, but the numbers for it are missing"):
        plan([columns("a", [Size(640, 480)], ResolutionRule(crop=True))])


def test_a_million_images_are_planned_in_seconds() -> None:
    random = np.random.default_rng(0)
    width, height = random.integers(300, 6000, (2, 1_000_000))
    started = time.process_time()
    made = plan([DatasetColumns("a", ResolutionRule(), np.arange(1_000_000), width, height)])
    made.fingerprint()
    assert time.process_time() - started < 5
    assert made.columns.nbytes <= 44_000_000
