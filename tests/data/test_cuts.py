"""Large pictures that are shrunk first, and cuts around faces; covering a target is in test_buckets.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.config.aspects import AspectBucket
from helpers.data.base.sample import Size
from helpers.data.plan.buckets import DatasetColumns, geometry, plan
from helpers.data.plan.targets import ResolutionRule

SHRINKING = ResolutionRule(crop=True, crop_style="center", maximum_image_size=4, target_downsample_size=2)
FACE = ResolutionRule(crop=True, crop_style="face")

sizes = st.tuples(st.integers(1, 9000), st.integers(1, 9000)).filter(lambda size: max(size) <= 50 * min(size)).map(lambda s: Size(*s))
fractions = st.floats(0, 1, exclude_max=True)
shrinking = st.builds(
    lambda resolution, shrunk, largest, kind, aspect: ResolutionRule(
        resolution=resolution * (1 if kind == "area" else 512),
        resolution_type=kind,
        crop=True,
        crop_aspect=aspect,
        aspect_buckets=(AspectBucket(0.5), AspectBucket(2, 3)),
        maximum_image_size=resolution * shrunk * largest * (1 if kind == "area" else 512),
        target_downsample_size=resolution * shrunk * (1 if kind == "area" else 512),
    ),
    st.floats(0.1, 2),
    st.floats(1, 4),
    st.floats(1, 4),
    st.sampled_from(["area", "pixel"]),
    st.sampled_from(["square", "preserve", "random"]),
)


def test_a_picture_above_the_maximum_is_shrunk_to_the_size_asked_for_and_cut_there() -> None:
    cut = geometry(Size(3000, 2000), SHRINKING)
    assert (cut.resized, cut.target) == (Size(1732, 1155), Size(1024, 1024))
    assert (cut.left, cut.top) == ((1732 - 1024) // 2, (1155 - 1024) // 2)
    assert abs(cut.resized.area - 2e6) < 2000


def test_a_picture_at_the_maximum_is_treated_as_if_there_were_none() -> None:
    assert geometry(Size(2000, 2000), SHRINKING) == geometry(Size(2000, 2000), ResolutionRule(crop=True, crop_style="center"))
    assert geometry(Size(2001, 2000), SHRINKING).resized == Size(1415, 1414)


def test_with_pixels_the_shorter_side_counts() -> None:
    rule = ResolutionRule(512, "pixel", crop=True, crop_style="corner", maximum_image_size=1500, target_downsample_size=768)
    assert geometry(Size(3000, 2000), rule).resized == Size(1152, 768)
    assert geometry(Size(3000, 1500), rule).resized == Size(1024, 512)


def test_a_picture_too_long_to_be_cut_from_the_shrunk_one_covers_its_target_all_the_same() -> None:
    assert geometry(Size(8000, 1100), SHRINKING).resized == Size(7447, 1024)


def test_without_crop_nothing_is_shrunk_to_anything() -> None:
    assert geometry(Size(3000, 2000), dataclasses.replace(SHRINKING, crop=False)) == geometry(Size(3000, 2000), ResolutionRule())


@given(sizes, shrinking, fractions, fractions, fractions)
def test_a_shrunk_picture_keeps_its_aspect_and_its_cut_lies_inside(
    size: Size, rule: ResolutionRule, u: float, v: float, aspect_u: float
) -> None:
    cut = geometry(size, rule, u, v, aspect_u=aspect_u)
    plain = geometry(size, dataclasses.replace(rule, maximum_image_size=0), u, v, aspect_u=aspect_u)
    assert cut.target == plain.target
    assert 0 <= cut.left <= cut.resized.width - cut.target.width and 0 <= cut.top <= cut.resized.height - cut.target.height
    if cut.resized != plain.resized:
        assert cut.resized.area <= size.area, "shrinking never enlarges"
        assert cut.resized.width >= plain.resized.width - 1 and cut.resized.height >= plain.resized.height - 1
        scale = (cut.resized.area / size.area) ** 0.5
        assert abs(cut.resized.width - size.width * scale) <= 1 + size.width * scale / min(cut.resized)
    assert (cut.resized.area > size.area) <= (plain.resized.area > size.area)


@pytest.mark.parametrize(
    ("face", "left"),
    [((0.5, 0.5), 512), ((0.3, 0.5), 102), ((0.05, 0.5), 0), ((0.98, 0.5), 1024), (None, 512)],
)
def test_the_cut_is_around_the_face_as_far_as_the_picture_reaches(face: tuple[float, float] | None, left: int) -> None:
    cut = geometry(Size(4000, 2000), FACE, face=face)
    assert (cut.resized, cut.left, cut.top) == (Size(2048, 1024), left, 0)


def test_in_a_mirrored_picture_the_face_is_mirrored_too() -> None:
    straight = geometry(Size(4000, 2000), FACE, face=(0.3, 0.5))
    mirrored = geometry(Size(4000, 2000), FACE, face=(0.3, 0.5), flip=True)
    assert mirrored.left == 1024 - straight.left


@given(sizes, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_face_stays_in_its_cut(size: Size, x: float, y: float, flip: bool) -> None:
    cut = geometry(size, FACE, face=(x, y), flip=flip)
    shown_x, shown_y = (1 - x if flip else x) * cut.resized.width, y * cut.resized.height
    assert cut.left - 1 <= shown_x <= cut.left + cut.target.width + 1 and cut.top - 1 <= shown_y <= cut.top + cut.target.height + 1


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (FACE, "'a' crops around faces, but the numbers for it are missing"),
        (
            ResolutionRule(crop=True, crop_style="center", crop_aspect="random", aspect_buckets=(AspectBucket(1),)),
            "'a' has random aspects, but the numbers for it are missing",
        ),
    ],
)
def test_a_rule_without_its_numbers_is_a_bug(rule: ResolutionRule, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan([DatasetColumns("a", rule, np.arange(1), np.array([640]), np.array([480]))])
