"""What of the data must stay the same for a resumed run to be exact, as values that checkpoints hold.

Where latents are encoded while training runs, a checkpoint may be saved before all images have been read. Nothing has been learned from
the unread ones and their bytes are unknown, so the checkpoint says which they are and the comparison leaves them out.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import zlib
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from helpers.data.planned import PlannedData
from helpers.storage.memo import Memo, digest_of

UNREAD = "images_unread"  # in a fingerprint: which rows of the plan nobody has read


class DataFingerprint:
    """Values by name, computed when first asked for, and again until every image and every companion has been read.

    `settings` are further values, which do not depend on files. `memo` keeps the result for later starts.
    """

    def __init__(self, data: PlannedData, settings: Mapping[str, str], memo: Memo | None = None) -> None:
        self._data = data
        self._catalogue = data.catalogue
        self._settings = settings
        self._memo = memo
        self._complete: dict[str, str] | None = None

    def compute(self, like: Mapping[str, str] | None = None) -> dict[str, str]:
        """The fingerprint. With `like`, an earlier one, that of the images which had been read for that one."""
        unread = _unpacked(like.get(UNREAD, ""), len(self._data.plan)) if like is not None else None
        all_read = not any(self._catalogue.unread(dataset.id) for dataset in self._data.datasets)
        if all_read and (unread is None or not unread.any()):
            return dict(self._of_all_images())
        contents = list(self._contents())
        if unread is None:
            unread = np.array([content is None for content in contents])
        else:
            self._read_again(contents, unread)
        values = self._values(self._images(contents, unread.tolist()))
        if unread.any():
            values[UNREAD] = _packed(unread)
        return values

    @cached_property
    def _fixed(self) -> dict[str, str]:
        """What does not depend on the images' bytes."""
        captions = hashlib.sha256()
        for dataset in self._data.datasets:
            for caption in self._catalogue.captions_by_image(dataset.id):
                captions.update(f"{caption}\0".encode())
        return {"captions": captions.hexdigest(), **self._settings}

    @cached_property
    def _plan_hash(self) -> str:
        return self._data.plan.fingerprint()

    def _values(self, images: str) -> dict[str, str]:
        return {"plan": self._plan_hash, "images": images, **self._fixed}

    def _of_all_images(self) -> dict[str, str]:
        if self._complete is None:
            if self._memo is None:
                self._complete = self._computed()
            else:
                self._complete = self._memo.recall("fingerprint", digest_of(self._data.digest(), self._settings), self._computed)
        return self._complete

    def _computed(self) -> dict[str, str]:
        return self._values(self._images(self._contents(), itertools.repeat(False)))

    def _contents(self) -> Iterable[str | None]:
        """What `Catalogue.contents` returns, for each row of the plan."""
        return (content for dataset in self._data.datasets for content in self._catalogue.contents(dataset.id))

    def _images(self, contents: Iterable[str | None], left_aside: Iterable[bool]) -> str:
        """One digest of all images, in the order of the plan."""
        images = hashlib.sha256()
        keys = (key for dataset in self._data.datasets for key in self._catalogue.keys(dataset.id))
        for key, content, aside in zip(keys, contents, left_aside, strict=False):
            images.update(f"{key}\0{'' if aside else content}\0".encode())
        return images.hexdigest()

    def _read_again(self, contents: list[str | None], unread: NDArray[np.bool_]) -> None:
        """Read images that had been read and were touched since: only their bytes tell whether they changed."""
        touched = np.flatnonzero([content is None for content in contents] & ~unread).tolist()
        images = {row: int(self._data.plan.columns["row"][row]) for row in touched}
        found = {}
        for file in {file for image in images.values() for file in self._catalogue.unread_files(image)}:
            sample = self._catalogue.sample(file)
            try:
                found[file] = hashlib.sha256(self._data.sources[sample.dataset].read(sample.key)).hexdigest()
            except OSError:
                continue  # without content it differs from what it was, and the difference is reported
        self._catalogue.set_content(found.items())
        for row, image in images.items():
            contents[row] = self._catalogue.content(image)


def _packed(rows: NDArray[np.bool_]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(rows).tobytes(), 9)).decode()


def _unpacked(text: str, count: int) -> NDArray[np.bool_] | None:
    """None where it is of another number of rows: then the plans differ, which is reported."""
    if not text:
        return np.zeros(count, dtype=bool)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8))
    return bits[:count].astype(bool) if count <= len(bits) < count + 8 else None
