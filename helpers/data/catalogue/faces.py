"""Face detection, for crops around faces. Each image is searched once; the result is stored by the hash of its bytes.

The detector uses the cascades that OpenCV 4 ships: first the one for frontal faces, then the one for profiles, in both directions. It
is good enough to place a crop. It misses faces that are small, tilted or covered; such images are cropped in the center.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from helpers.config.sizes import FACE_CASCADE, PROFILE_CASCADE
from helpers.data.base.images import ImageError, decode
from helpers.data.base.sample import Size
from helpers.data.catalogue.catalogue import Catalogue
from helpers.errors import Interrupted, StorageError
from helpers.storage.backend import SourceBackend

# Change it when the detection changes: all images are then searched again.
FINDER = "cascades 1"

_EDGE = 640  # longer side of the searched image in pixels; a cascade's window has 20
_SMALLEST = 12  # a face takes at least 1/12 of the shorter side; smaller detections are mostly wrong
_SCALE, _NEIGHBORS = 1.1, 5  # factor between window sizes; detections that must overlap to count as a face
_BLOCK = 256  # images per transaction: a kill loses at most these
_TABLE = "CREATE TABLE IF NOT EXISTS faces (content TEXT PRIMARY KEY, finder TEXT NOT NULL, x REAL, y REAL)"
_KNOWN = "LEFT JOIN faces ON faces.content = used.content AND faces.finder = ?"

Middle = tuple[float, float]  # center of a face, as shares of the image's width and height
Detector = Callable[[Image.Image], Middle | None]


class CascadeDetector:
    """Returns the center of the largest face of an image. Threads may share one; each thread loads its own cascades."""

    def __init__(self) -> None:
        import cv2

        self._library: Any = cv2
        self._library.setNumThreads(1)  # images are already searched in parallel
        self._of_thread = threading.local()

    def __call__(self, image: Image.Image) -> Middle | None:
        gray = np.asarray(image.convert("L"))
        frontal, profile = self._cascades()
        found = _boxes(frontal, gray)
        if not found:
            width = gray.shape[1]
            mirrored = _boxes(profile, np.ascontiguousarray(gray[:, ::-1]))
            found = [*_boxes(profile, gray), *((width - x - w, y, w, h) for x, y, w, h in mirrored)]
        if not found:
            return None
        x, y, w, h = max(found, key=lambda box: (box[2] * box[3], -box[1], -box[0]))
        return (x + w / 2) / gray.shape[1], (y + h / 2) / gray.shape[0]

    def _cascades(self) -> tuple[Any, Any]:
        if not hasattr(self._of_thread, "cascades"):
            folder = Path(self._library.data.haarcascades)
            self._of_thread.cascades = tuple(
                self._library.CascadeClassifier(str(folder / name)) for name in (FACE_CASCADE, PROFILE_CASCADE)
            )
        return self._of_thread.cascades


def find_faces(
    backend: SourceBackend,
    dataset: str,
    catalogue: Catalogue,
    detector: Callable[[], Detector] = CascadeDetector,
    *,
    threads: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Search every image in use that has not been searched yet. Returns the number of images that were read.

    `detector` is called only if there is an image to search. A kill loses at most `_BLOCK` images. If `should_stop()` becomes true, the
    results so far are stored and Interrupted is raised. StorageError if the source fails.
    """
    with catalogue.transaction() as database:
        database.execute(_TABLE)
        pending = database.execute(
            f"SELECT used.id, used.key, used.width, used.height FROM used {_KNOWN}"
            " WHERE used.dataset = ? AND faces.content IS NULL ORDER BY used.id",
            (FINDER, dataset),
        ).fetchall()
    if not pending:
        return 0
    finder = detector()

    def search(image: tuple[int, str, int, int]) -> tuple[int, str, Middle | None] | None:
        return None if should_stop() else _search(backend, finder, *image)

    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="faces") as pool:
        for block in _blocks(pending):
            _store(catalogue, [found for found in pool.map(search, block) if found is not None])
            if should_stop():
                raise Interrupted("stopped while images were searched for faces; start again to continue")
            done += len(block)
            if on_progress is not None:
                on_progress(done, len(pending))
    return done


def face_middles(catalogue: Catalogue, dataset: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Horizontal and vertical face centers of the images in use, in key order: shares of width and height, (N,). NaN without a face."""
    with catalogue.transaction() as database:
        database.execute(_TABLE)
        rows = database.execute(f"SELECT faces.x, faces.y FROM used {_KNOWN} WHERE used.dataset = ? ORDER BY used.key", (FINDER, dataset))
        middles = np.array([(np.nan, np.nan) if x is None else (x, y) for x, y in rows], np.float64).reshape(-1, 2)
    return middles[:, 0].copy(), middles[:, 1].copy()


def _search(backend: SourceBackend, finder: Detector, row: int, key: str, width: int, height: int) -> tuple[int, str, Middle | None] | None:
    """Row, content hash and face of one image. None for a file that cannot be opened, which encoding will report."""
    try:
        data = backend.read(key)
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise StorageError(f"{backend.name}: {key} could not be read: {error.strerror or error}") from error
    factor = min(1.0, _EDGE / max(width, height))
    shown = Size(max(1, round(width * factor)), max(1, round(height * factor)))
    try:
        face = finder(decode(data, shown).resize(shown, Image.Resampling.BOX))
    except ImageError:
        face = None  # encoding will report it
    return row, hashlib.sha256(data).hexdigest(), face


def _store(catalogue: Catalogue, found: list[tuple[int, str, Middle | None]]) -> None:
    catalogue.set_content((row, content) for row, content, _ in found)
    with catalogue.transaction() as database:
        database.executemany(
            "INSERT OR REPLACE INTO faces VALUES (?, ?, ?, ?)", ((content, FINDER, *(face or (None, None))) for _, content, face in found)
        )


def _blocks(pending: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(pending), _BLOCK):
        yield pending[start : start + _BLOCK]


def _boxes(cascade: Any, gray: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of the faces that the cascade detects."""
    smallest = min(gray.shape) // _SMALLEST
    found = cascade.detectMultiScale(gray, _SCALE, _NEIGHBORS, minSize=(smallest, smallest))
    return [(int(x), int(y), int(w), int(h)) for x, y, w, h in found]
