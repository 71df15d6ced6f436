"""The keys of latents and of text tensors in caches, and the facts they are made of.

A key is a hash of everything that the record depends on, so a cache never has to be invalidated: what changed has another key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from helpers.data.base.images import PIXELS_VERSION
from helpers.data.base.sample import Sample
from helpers.data.cache.cache import record_key
from helpers.data.encode.companions import Kind
from helpers.data.plan.buckets import BucketPlan

Rows = NDArray[np.int64]


def crops(plan: BucketPlan, rows: Rows | Sequence[int]) -> list[str]:
    """For each row of a plan, everything about its crop that its pixels depend on. Reads columns: a plan may have millions of rows."""
    columns = plan.columns[rows]
    names = ("resized_width", "resized_height", "top", "left", "shape", "flip")
    return [
        f"{width}x{height} {top},{left} {plan.shapes[shape]}{' flip' if flip else ''} v{PIXELS_VERSION}"
        for width, height, top, left, shape, flip in zip(*(columns[name].tolist() for name in names), strict=True)
    ]


def latents_subject(sample: Sample) -> str:
    """The name under which the facts of an image's latents are stored."""
    return f"{sample.dataset}/{sample.key}"


def latents_facts(content: str, crop: str, encoder: str, cache_dtype: str, companions: Sequence[Kind] = ()) -> dict[str, str]:
    """All that a record of latents depends on.

    `content` is what `Catalogue.content` returns, `crop` an element of `crops`, `encoder` the fingerprint of the codec, `companions` those
    of the dataset's images.
    """
    facts = {"image": content, "encoder": encoder, "geometry": crop, "precision": cache_dtype}
    return facts | {companion.role: companion.fact for companion in companions}


def latents_key(facts: Mapping[str, str]) -> bytes:
    """The key of the record with these facts."""
    image, encoder, geometry, precision, *companions = facts.values()
    return record_key("latents", image, geometry, encoder, precision, *companions)


def text_key(caption: str | None, fingerprint: str, cache_dtype: str) -> bytes:
    """The key of a caption's text tensors; None is the family's unconditional. `fingerprint` is that of the text encoders."""
    kind = "unconditional" if caption is None else "text"
    return record_key(kind, caption or "", fingerprint, cache_dtype)


def text_subject(caption: str | None) -> str:
    """The name under which the facts of a caption's text tensors are stored."""
    return "unconditional" if caption is None else f"text {hashlib.sha256(json.dumps(caption).encode()).hexdigest()}"
