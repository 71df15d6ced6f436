"""Thumbnails for the report page: a few images of every dataset, resized and cropped exactly as for training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from helpers.data.base.images import PIXELS_VERSION, ImageError, crop, cropped, decode, decode_alpha, decode_mask
from helpers.data.base.sample import MASK, Geometry, Size
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.plan.buckets import BucketPlan
from helpers.data.report.survey import Thumbnail
from helpers.storage.backend import SourceBackend
from helpers.storage.memo import Memo, digest_of

PER_DATASET = 24
LONGER_SIDE = 256  # pixels of a thumbnail
MASKED_DARKENING = 4  # black parts of a mask are shown with so small a fraction of their brightness
_QUALITY = 82  # of its JPEG


def chosen(plan: BucketPlan, dataset: int, most: int = PER_DATASET) -> list[int]:
    """Rows of the plan to show for a dataset: images of every shape, the most common shape first, spread evenly over its samples.

    Shapes take turns. If there are more than `most` shapes, the rarest are not shown.
    """
    rows = np.flatnonzero(plan.columns["dataset"] == dataset)
    shapes = plan.columns["shape"][rows]
    counts = np.bincount(shapes, minlength=len(plan.shapes))
    shown = [shape for shape in np.argsort(-counts, kind="stable").tolist() if counts[shape]]
    shares = dict.fromkeys(shown, 0)
    left = min(most, len(rows))
    while left:
        for shape in shown:
            if left and shares[shape] < counts[shape]:
                shares[shape] += 1
                left -= 1
    picked = []
    for shape, share in shares.items():
        members = rows[shapes == shape]
        picked += [int(members[(2 * index + 1) * len(members) // (2 * share)]) for index in range(share)]
    return picked


def thumbnails(
    plan: BucketPlan,
    sources: Sequence[SourceBackend],
    catalogue: Catalogue,
    memo: Memo,
    threads: int,
    masks: Sequence[SourceBackend | None] = (),
) -> list[Thumbnail]:
    """A few images of every dataset, the most common shape first. Reads only what is not in `memo`.

    `sources` are in the plan's order, and so are `masks`: where loss masks are read from, if a dataset has any. What they leave black is
    shown dark.
    """
    rows = [(dataset, place, row) for dataset in range(len(plan.datasets)) for place, row in enumerate(chosen(plan, dataset))]

    def make(each: tuple[int, int, int]) -> Thumbnail:
        dataset, place, row = each
        return _thumbnail(plan, row, sources[dataset], catalogue, memo, place, masks[dataset] if masks else None)

    with ThreadPoolExecutor(threads, thread_name_prefix="thumbnails") as pool:
        return list(pool.map(make, rows))


def _thumbnail(
    plan: BucketPlan, row: int, source: SourceBackend, catalogue: Catalogue, memo: Memo, place: int, masks: SourceBackend | None
) -> Thumbnail:
    """One row of the plan. In the memo it is named by its place on the page, so that there are never more files than places."""
    number = int(plan.columns["row"][row])
    sample, geometry, upscaled = catalogue.sample(number), plan.geometry(row), bool(plan.columns["upscaled"][row])
    caption = sample.captions[0]
    name = f"thumbnail {place} of {sample.dataset}"
    paired = catalogue.companion_row(number, MASK) if masks is not None else None
    mask_version = "" if masks is None else "alpha" if paired is None else catalogue.file_version(paired)
    inputs = digest_of(sample.key, catalogue.file_version(number), mask_version, repr(geometry), PIXELS_VERSION, LONGER_SIDE, _QUALITY)
    jpeg = memo.load_bytes(name, inputs)
    if jpeg is None:
        try:
            data = source.read(sample.key)
            mask = None
            if masks is not None:
                mask = decode_alpha(data) if paired is None else decode_mask(masks.read(catalogue.sample(paired).key))
            jpeg = _jpeg(data, geometry, mask)
        except (ImageError, OSError) as error:  # only the page misses it: the run reports the file when it encodes it
            return Thumbnail(sample.dataset, sample.key, caption, geometry, upscaled, problem=str(error))
        memo.save_bytes(name, inputs, jpeg)
    return Thumbnail(sample.dataset, sample.key, caption, geometry, upscaled, jpeg=jpeg)


def _jpeg(data: bytes, geometry: Geometry, mask: Image.Image | None) -> bytes:
    """The training pixels of an image file as a JPEG, downscaled to `LONGER_SIDE` if they are larger; dark where the mask is black."""
    pixels = crop(decode(data, geometry.resized), geometry)
    levels = pixels.add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(levels)
    if mask is not None:
        white = cropped(mask, Size(*mask.size), geometry, Image.Resampling.BOX)
        image = Image.composite(image, image.point(lambda level: level // MASKED_DARKENING), white)
    image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
