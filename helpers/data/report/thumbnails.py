"""Small pictures of what is trained on: a few images of every data set, resized and cut exactly as for training."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from helpers.data.base.images import PIXELS_VERSION, ImageError, cut, decode
from helpers.data.base.sample import Geometry
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.plan.buckets import BucketPlan
from helpers.data.report.dataset_report import Memory
from helpers.data.report.survey import Thumbnail
from helpers.storage.backend import SourceBackend

PER_DATASET = 24
LONGER_SIDE = 256  # pixels of a thumbnail
_QUALITY = 82  # of its JPEG


def chosen(plan: BucketPlan, dataset: int, most: int = PER_DATASET) -> list[int]:
    """Rows of the plan to show of a data set: of every shape, the commonest first, images spread evenly over its samples.

    Shapes take turns, so that where there are more than `most` the rarest are not shown.
    """
    rows = np.flatnonzero(plan.columns["dataset"] == dataset)
    shapes = plan.columns["shape"][rows]
    counts = np.bincount(shapes, minlength=len(plan.shapes))
    order = [shape for shape in np.argsort(-counts, kind="stable").tolist() if counts[shape]]
    shares = dict.fromkeys(order, 0)
    left = min(most, len(rows))
    while left:
        for shape in order:
            if left and shares[shape] < counts[shape]:
                shares[shape] += 1
                left -= 1
    picked = []
    for shape, share in shares.items():
        members = rows[shapes == shape]
        picked += [int(members[(2 * index + 1) * len(members) // (2 * share)]) for index in range(share)]
    return picked


def thumbnails(plan: BucketPlan, sources: Sequence[SourceBackend], catalogue: Catalogue, memory: Memory, threads: int) -> list[Thumbnail]:
    """A few images of every data set, commonest shape first; `sources` are in the plan's order. Opens what is not in the memory."""
    rows = [(dataset, row) for dataset in range(len(plan.datasets)) for row in chosen(plan, dataset)]
    with ThreadPoolExecutor(threads, thread_name_prefix="thumbnails") as pool:
        made = list(pool.map(lambda each: _thumbnail(plan, each[1], sources[each[0]], catalogue, memory), rows))
    memory.save()
    return made


def _thumbnail(plan: BucketPlan, row: int, source: SourceBackend, catalogue: Catalogue, memory: Memory) -> Thumbnail:
    number = int(plan.columns["row"][row])
    sample, geometry, upscaled = catalogue.sample(number), plan.geometry(row), bool(plan.columns["upscaled"][row])
    caption = sample.captions[0]
    made_from = (sample.dataset, sample.key, catalogue.version(number), repr(geometry), f"{PIXELS_VERSION} {LONGER_SIDE} {_QUALITY}")
    try:
        encoded = memory.recall(lambda: base64.b64encode(_jpeg(source.read(sample.key), geometry)).decode(), *made_from)
    except (ImageError, OSError) as error:  # of the page's concern only: the run itself will say more when it reads the file
        return Thumbnail(sample.dataset, sample.key, caption, geometry, upscaled, problem=str(error))
    return Thumbnail(sample.dataset, sample.key, caption, geometry, upscaled, jpeg=base64.b64decode(encoded))


def _jpeg(data: bytes, geometry: Geometry) -> bytes:
    """What is trained of an image file, shrunk to `LONGER_SIDE`; smaller ones stay as they are."""
    pixels = cut(decode(data, geometry.resized), geometry)
    levels = pixels.add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(levels)
    image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
