"""Images in one folder, their captions in another: one source that shows both as if each caption were beside its image."""

from __future__ import annotations

import os.path
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from helpers.storage.backend import Entry
from helpers.storage.local import LocalSource


class WithCaptionFolder:
    """The files of `images`, read-only, with the caption files of another folder in place of those beside the images.

    `endings` are the extensions of caption files, in lower case. A caption file beside an image is listed with the reason that it is not
    read. Other files in the caption folder are not listed.
    """

    def __init__(self, images: str | Path, captions: str | Path, endings: tuple[str, ...]) -> None:
        self._images, self._captions, self._endings = LocalSource(images), LocalSource(captions), endings
        self.root = self._images.root

    @property
    def name(self) -> str:
        return self._images.name

    def list(self) -> Iterator[Entry]:
        """All files, those of the images' folder first. DataError if one of the folders does not exist."""
        captions = {entry.key: entry for entry in self._captions.list() if not entry.is_folder and self._is_caption(entry.key)}
        problem = f"caption beside the image: captions are read from {self._captions.name}"
        for entry in self._images.list():
            if self._is_in_caption_folder(entry.key) or entry.key in captions:
                continue
            yield replace(entry, problem=problem) if self._is_caption(entry.key) and not entry.is_folder else entry
        yield from captions.values()

    def open(self, key: str) -> BinaryIO:
        return self._of(key).open(key)

    def read(self, key: str) -> bytes:
        return self._of(key).read(key)

    def _of(self, key: str) -> LocalSource:
        return self._captions if self._is_caption(key) else self._images

    def _is_caption(self, key: str) -> bool:
        return posixpath.splitext(key)[1].lower() in self._endings

    def _is_in_caption_folder(self, key: str) -> bool:
        inside = os.path.relpath(self._captions.root, self.root).replace(os.sep, "/")
        return not inside.startswith("..") and inside != "." and key.startswith(f"{inside}/")
