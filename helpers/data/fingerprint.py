"""What of the data must be the same for a run to go on as it would have, as values that checkpoints hold.

Where latents are encoded while training runs, some images have not been read when a checkpoint is made. Nothing has been learnt from
them, and their bytes are unknown: the checkpoint says which they are, and the comparison leaves them aside.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.buckets import BucketPlan
from helpers.data.catalogue import Catalogue
from helpers.storage.backend import SourceBackend

UNREAD = "images_unread"  # of the plan's rows, in the checkpoint


class DataFingerprint:
    """Computed anew until every image has been read."""

    def __init__(
        self,
        plan: BucketPlan,
        datasets: Sequence[DatasetConfig],
        sources: Sequence[SourceBackend],
        catalogue: Catalogue,
        fixed: Mapping[str, str],
    ) -> None:
        self._plan = plan
        self._datasets = datasets
        self._sources = sources
        self._catalogue = catalogue
        captions = hashlib.sha256()
        for dataset in datasets:
            for caption in catalogue.captions_by_image(dataset.id):
                captions.update(f"{caption}\0".encode())
        self._plan_hash = plan.fingerprint()
        self._fixed = {"captions": captions.hexdigest(), **fixed}
        self._complete: dict[str, str] | None = None

    def __call__(self, like: Mapping[str, str] | None = None) -> dict[str, str]:
        """Values by name. With `like`, an earlier fingerprint, of the same images as that one."""
        unread = _unpacked(like.get(UNREAD, ""), len(self._plan)) if like is not None else None
        if like is None and self._complete is not None:
            return dict(self._complete)
        contents = [content for dataset in self._datasets for content in self._catalogue.contents(dataset.id)]
        if unread is None:
            unread = np.array([content is None for content in contents])
        else:
            self._read_again(contents, unread)
        images = hashlib.sha256()
        keys = (key for dataset in self._datasets for key in self._catalogue.keys(dataset.id))
        for key, content, left_aside in zip(keys, contents, unread.tolist(), strict=True):
            images.update(f"{key}\0{'' if left_aside else content}\0".encode())
        told = {"plan": self._plan_hash, "images": images.hexdigest(), **self._fixed}
        if unread.any():
            told[UNREAD] = _packed(unread)
        elif like is None:
            self._complete = dict(told)
        return told

    def _read_again(self, contents: list[str | None], unread: NDArray[np.bool_]) -> None:
        """Images that had been read and were touched since: what they hold is in their bytes, not in the catalogue."""
        found = {}
        for row in np.flatnonzero([content is None for content in contents] & ~unread).tolist():
            image = self._plan.columns[row]
            key = self._catalogue.sample(int(image["row"])).key
            try:
                contents[row] = hashlib.sha256(self._sources[int(image["dataset"])].read(key)).hexdigest()
            except OSError:
                continue  # without content it differs from what it was, which is then said
            found[int(image["row"])] = contents[row]
        self._catalogue.set_content((image, content) for image, content in found.items() if content is not None)


def _packed(rows: NDArray[np.bool_]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(rows).tobytes(), 9)).decode()


def _unpacked(text: str, count: int) -> NDArray[np.bool_] | None:
    """None where it is about another number of rows: the plans differ, and that is said."""
    if not text:
        return np.zeros(count, dtype=bool)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8))
    return bits[:count].astype(bool) if count <= len(bits) < count + 8 else None
