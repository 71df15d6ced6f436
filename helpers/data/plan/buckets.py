"""How every image becomes training pixels: sizes in, `Geometry` out. Pure arithmetic; opens no file and draws no number.

`targets` says which size an image is trained at, `cuts` how it is resized and where the target is cut out; the plan holds both for
all images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.data.base.sample import Geometry, Size
from helpers.data.plan.cuts import Places, cuts
from helpers.data.plan.targets import Fractions, Integers, ResolutionRule, targets

ROW = np.dtype(
    [
        ("row", np.int64),  # the image's row in the catalogue
        ("width", np.int32),  # of the image as shown
        ("height", np.int32),
        ("resized_width", np.int32),
        ("resized_height", np.int32),
        ("top", np.int32),  # of the cut, in resized pixels
        ("left", np.int32),
        ("dataset", np.int16),  # index in `BucketPlan.datasets`
        ("shape", np.int16),  # index in `BucketPlan.shapes`
        ("flip", np.bool_),
        ("upscaled", np.bool_),  # resized to more pixels than the file has
    ]
)


@dataclass(frozen=True)
class DatasetColumns:
    """The usable images of one data set, in key order, as arrays of equal length N.

    `crop_u` and `crop_v` in [0, 1) place a random cut from left to right and from top to bottom; needed only where
    `rule.style` is random. `aspect_u` in [0, 1) draws the shape where `rule.draws_aspect`. `face_x` and `face_y` in [0, 1] are the
    middle of the face in the picture as shown, before any mirroring, and NaN where there is none; needed only where `rule.style` is
    face. `flip` marks the images to mirror; None mirrors none.
    """

    dataset: str
    rule: ResolutionRule
    rows: Integers
    width: Integers
    height: Integers
    crop_u: Fractions | None = None
    crop_v: Fractions | None = None
    aspect_u: Fractions | None = None
    face_x: Fractions | None = None
    face_y: Fractions | None = None
    flip: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class BucketPlan:
    """The cut of every sample, ordered by (data set, key). Sample i of the plan is `columns[i]`, of dtype `ROW`."""

    datasets: tuple[str, ...]
    shapes: tuple[Size, ...]  # every target size in use, sorted
    columns: NDArray[Any]

    def __len__(self) -> int:
        return len(self.columns)

    def geometry(self, index: int) -> Geometry:
        row = self.columns[index]
        return Geometry(
            original=Size(int(row["width"]), int(row["height"])),
            resized=Size(int(row["resized_width"]), int(row["resized_height"])),
            top=int(row["top"]),
            left=int(row["left"]),
            target=self.shapes[row["shape"]],
            flip=bool(row["flip"]),
        )

    def fingerprint(self) -> str:
        """64 hex digits that change with any cut, the number of samples or their order.

        Catalogue rows do not count: they number the same images differently in a catalogue that was built anew. What the images
        are is told by their content hashes.
        """
        digest = hashlib.sha256(repr((self.datasets, self.shapes)).encode())
        for name in ROW.names or ():
            if name != "row":
                digest.update(np.ascontiguousarray(self.columns[name]).tobytes())
        return digest.hexdigest()


def geometry(
    size: Size,
    rule: ResolutionRule,
    u: float = 0.5,
    v: float = 0.5,
    flip: bool = False,
    *,
    aspect_u: float = 0.5,
    face: tuple[float, float] | None = None,
) -> Geometry:
    """The cut of one image; the numbers are those of `DatasetColumns`."""
    face_x, face_y = face or (np.nan, np.nan)
    image = DatasetColumns(
        dataset="",
        rule=rule,
        rows=np.zeros(1, np.int64),
        width=np.array([size.width]),
        height=np.array([size.height]),
        crop_u=np.array([u]),
        crop_v=np.array([v]),
        aspect_u=np.array([aspect_u]),
        face_x=np.array([face_x]),
        face_y=np.array([face_y]),
        flip=np.array([flip]),
    )
    return plan([image]).geometry(0)


def plan(datasets: Sequence[DatasetColumns]) -> BucketPlan:
    """The cuts of all images of all data sets. None is dropped; a shape may hold a single sample."""
    parts = [_part(index, dataset) for index, dataset in enumerate(datasets)]
    targets = np.concatenate([target for _, target in parts]) if parts else np.empty(0, np.int64)
    shapes, shape_index = np.unique(targets, return_inverse=True)
    columns = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, ROW)
    columns["shape"] = shape_index
    return BucketPlan(
        datasets=tuple(dataset.dataset for dataset in datasets),
        shapes=tuple(Size(int(shape) >> 32, int(shape) & 0xFFFFFFFF) for shape in shapes),
        columns=columns,
    )


def _part(index: int, dataset: DatasetColumns) -> tuple[NDArray[Any], Integers]:
    """The plan rows of one data set, and each row's target as one number (width * 2^32 + height) that sorts like the size."""
    _require_draws(dataset)
    rule, width, height = dataset.rule, dataset.width.astype(np.int64), dataset.height.astype(np.int64)
    target_width, target_height = targets(width, height, rule, dataset.aspect_u)
    face_x = dataset.face_x
    if face_x is not None and dataset.flip is not None:
        face_x = np.where(dataset.flip, 1 - face_x, face_x)  # the cut is made in the mirrored picture
    places = Places(dataset.crop_u, dataset.crop_v, face_x, dataset.face_y)
    cut = cuts(width, height, target_width, target_height, rule, places)
    columns = np.zeros(len(width), ROW)
    columns["row"], columns["dataset"] = dataset.rows, index
    columns["width"], columns["height"] = width, height
    columns["resized_width"], columns["resized_height"] = cut.resized_width, cut.resized_height
    columns["top"], columns["left"] = cut.top, cut.left
    columns["upscaled"] = cut.resized_width * cut.resized_height > width * height
    if dataset.flip is not None:
        columns["flip"] = dataset.flip
    return columns, (target_width << 32) | target_height


def _require_draws(dataset: DatasetColumns) -> None:
    """That a rule comes without its numbers is a bug of the caller's."""
    needed = {
        "crops at random": (dataset.rule.style == "random", dataset.crop_u, dataset.crop_v),
        "draws its aspects": (dataset.rule.draws_aspect, dataset.aspect_u),
        "crops around faces": (dataset.rule.style == "face", dataset.face_x, dataset.face_y),
    }
    for does, (asked, *given) in needed.items():
        if asked and any(numbers is None for numbers in given):
            raise ValueError(f"data set {dataset.dataset!r} {does} but was given no draws")
