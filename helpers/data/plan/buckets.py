"""The plan: for every image its training size, its resized size and its crop. It opens no file and draws no random number.

    planned = plan([DatasetColumns("photos", ResolutionRule(1.0), rows, width, height)])
    planned.geometry(0)  # Geometry(original=1920x1080, resized=1365x768, top=0, left=10, target=1344x768, flip=False)

`targets` computes the training size, `crops` the resized size and the crop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.data.base.sample import Geometry, Size
from helpers.data.plan.crops import Places, crops
from helpers.data.plan.targets import Fractions, Integers, ResolutionRule, targets

ROW = np.dtype(
    [
        ("row", np.int64),  # the image's row id in the catalogue
        ("width", np.int32),  # of the image, after EXIF rotation
        ("height", np.int32),
        ("resized_width", np.int32),
        ("resized_height", np.int32),
        ("top", np.int32),  # of the crop, in pixels of the resized image
        ("left", np.int32),
        ("dataset", np.int16),  # index in `BucketPlan.datasets`
        ("shape", np.int16),  # index in `BucketPlan.shapes`
        ("flip", np.bool_),
        ("upscaled", np.bool_),  # resized to more pixels than the image has
    ]
)


@dataclass(frozen=True)
class DatasetColumns:
    """The images in use of one dataset, in key order, as arrays (N,).

    `crop_u` and `crop_v` in [0, 1) place a random crop horizontally and vertically; needed only if `rule.style` is random. `aspect_u` in
    [0, 1) chooses the aspect if `rule.draws_aspect`. `face_x` and `face_y` in [0, 1] are the center of the face before any mirroring, NaN
    without a face; needed only if `rule.style` is face. `flip` marks the images to mirror; None mirrors none.
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
    """Size and crop of every sample, in the order of (dataset, key). Sample i is `columns[i]`, of dtype `ROW`."""

    datasets: tuple[str, ...]
    shapes: tuple[Size, ...]  # every training size in use, sorted
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
        """64 hex digits. They change with any size or crop, the number of samples, and their order.

        Catalogue row ids are left out: a rebuilt catalogue numbers the same images differently. The images themselves are compared by
        their content hashes.
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
    """Size and crop of one image; the arguments are those of `DatasetColumns`."""
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
    """Plan all images of all datasets. None is dropped, even if it is the only one of its shape."""
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
    """The rows of one dataset, and each row's training size as one number (width * 2^32 + height), which sorts like the size."""
    _require_draws(dataset)
    rule, width, height = dataset.rule, dataset.width.astype(np.int64), dataset.height.astype(np.int64)
    target_width, target_height = targets(width, height, rule, dataset.aspect_u)
    face_x = dataset.face_x
    if face_x is not None and dataset.flip is not None:
        face_x = np.where(dataset.flip, 1 - face_x, face_x)  # the crop is made in the mirrored image
    places = Places(dataset.crop_u, dataset.crop_v, face_x, dataset.face_y)
    crop = crops(width, height, target_width, target_height, rule, places)
    columns = np.zeros(len(width), ROW)
    columns["row"], columns["dataset"] = dataset.rows, index
    columns["width"], columns["height"] = width, height
    columns["resized_width"], columns["resized_height"] = crop.resized_width, crop.resized_height
    columns["top"], columns["left"] = crop.top, crop.left
    columns["upscaled"] = crop.resized_width * crop.resized_height > width * height
    if dataset.flip is not None:
        columns["flip"] = dataset.flip
    return columns, (target_width << 32) | target_height


def _require_draws(dataset: DatasetColumns) -> None:
    """ValueError, a bug of the caller, if a rule lacks the random numbers or faces it needs."""
    needed = {
        "crops at random": (dataset.rule.style == "random", dataset.crop_u, dataset.crop_v),
        "has random aspects": (dataset.rule.draws_aspect, dataset.aspect_u),
        "crops around faces": (dataset.rule.style == "face", dataset.face_x, dataset.face_y),
    }
    for does, (is_needed, *arrays) in needed.items():
        if is_needed and any(array is None for array in arrays):
            raise ValueError(f"dataset {dataset.dataset!r} {does}, but the numbers for it are missing")
