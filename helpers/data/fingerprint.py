"""What of the data must be the same for a run to go on as it would have, as values that checkpoints hold.

Where latents are encoded while training runs, some images have not been read when a checkpoint is made. Nothing has been learnt from
them, and their bytes are unknown: the checkpoint says which they are, and the comparison leaves them aside.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.plan.buckets import BucketPlan
from helpers.storage.backend import SourceBackend
from helpers.storage.memo import Memo, digest_of

UNREAD = "images_unread"  # of the plan's rows, in the checkpoint


class DataFingerprint:
    """Computed when first asked for, and anew until every image, and every condition, has been read.

    `sources` are those of the data sets and of their conditions, by id.
    `inputs` is a digest of what the images and captions in use are; under it the result is kept in `memo` for later starts.
    """

    def __init__(
        self,
        plan: BucketPlan,
        datasets: Sequence[DatasetConfig],
        sources: Mapping[str, SourceBackend],
        catalogue: Catalogue,
        fixed: Mapping[str, str],
        inputs: Callable[[], str] = lambda: "",
        memo: Memo | None = None,
    ) -> None:
        self._plan = plan
        self._datasets = datasets
        self._sources = sources
        self._catalogue = catalogue
        self._settings = fixed
        self._inputs = inputs
        self._memo = memo
        self._complete: dict[str, str] | None = None

    def __call__(self, like: Mapping[str, str] | None = None) -> dict[str, str]:
        """Values by name. With `like`, an earlier fingerprint, of the same images as that one."""
        unread = _unpacked(like.get(UNREAD, ""), len(self._plan)) if like is not None else None
        all_read = not any(self._catalogue.unread(dataset.id) for dataset in self._datasets)
        if all_read and (unread is None or not unread.any()):
            return dict(self._of_all_images())
        contents = [content for dataset in self._datasets for content in self._catalogue.contents(dataset.id)]
        if unread is None:
            unread = np.array([content is None for content in contents])
        else:
            self._read_again(contents, unread)
        told = self._told(self._images(contents, unread.tolist()))
        if unread.any():
            told[UNREAD] = _packed(unread)
        return told

    @cached_property
    def _fixed(self) -> dict[str, str]:
        """What does not depend on the images' bytes."""
        captions = hashlib.sha256()
        for dataset in self._datasets:
            for caption in self._catalogue.captions_by_image(dataset.id):
                captions.update(f"{caption}\0".encode())
        return {"captions": captions.hexdigest(), **self._settings}

    @cached_property
    def _plan_hash(self) -> str:
        return self._plan.fingerprint()

    def _told(self, images: str) -> dict[str, str]:
        return {"plan": self._plan_hash, "images": images, **self._fixed}

    def _of_all_images(self) -> dict[str, str]:
        if self._complete is None:
            if self._memo is None:
                self._complete = self._computed()
            else:
                self._complete = self._memo.recall("fingerprint", digest_of(self._inputs(), self._settings), self._computed)
        return self._complete

    def _computed(self) -> dict[str, str]:
        contents = (content for dataset in self._datasets for content in self._catalogue.contents(dataset.id))
        return self._told(self._images(contents, itertools.repeat(False)))

    def _images(self, contents: Iterable[str | None], left_aside: Iterable[bool]) -> str:
        """One digest of all images, in the order of the plan."""
        images = hashlib.sha256()
        keys = (key for dataset in self._datasets for key in self._catalogue.keys(dataset.id))
        for key, content, aside in zip(keys, contents, left_aside, strict=False):
            images.update(f"{key}\0{'' if aside else content}\0".encode())
        return images.hexdigest()

    def _read_again(self, contents: list[str | None], unread: NDArray[np.bool_]) -> None:
        """Images that had been read and were touched since: what they hold is in their bytes, not in the catalogue."""
        touched = np.flatnonzero([content is None for content in contents] & ~unread).tolist()
        images = {row: int(self._plan.columns["row"][row]) for row in touched}
        found = {}
        for file in {file for image in images.values() for file in self._catalogue.unread_files(image)}:
            sample = self._catalogue.sample(file)
            try:
                found[file] = hashlib.sha256(self._sources[sample.dataset].read(sample.key)).hexdigest()
            except OSError:
                continue  # without content it differs from what it was, which is then said
        self._catalogue.set_content(found.items())
        for row, image in images.items():
            contents[row] = self._catalogue.content(image)


def _packed(rows: NDArray[np.bool_]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(rows).tobytes(), 9)).decode()


def _unpacked(text: str, count: int) -> NDArray[np.bool_] | None:
    """None where it is about another number of rows: the plans differ, and that is said."""
    if not text:
        return np.zeros(count, dtype=bool)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8))
    return bits[:count].astype(bool) if count <= len(bits) < count + 8 else None
