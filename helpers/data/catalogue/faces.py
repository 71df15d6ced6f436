"""Where faces are, for cuts around them: looked for once in each picture's pixels, and remembered under the hash of its bytes.

The detector is the frontal cascade that OpenCV 4 ships, then the one for profiles, on both sides. It is exact enough to place a cut:
it misses faces that are small, tilted or covered, and such pictures are cut in the middle.
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

# To be raised by whoever changes what is found: all pictures are then looked at again.
FINDER = "cascades 1"

_EDGE = 640  # pixels of the longer side that a face is looked for at; a window of the cascades has 20
_SMALLEST = 12  # a face's share of the shorter side is at least one in this many: smaller finds are mostly none
_SCALE, _NEIGHBOURS = 1.1, 5  # between window sizes; finds that must agree on one face
_BLOCK = 256  # pictures looked at between two commits: what a kill can lose
_TABLE = "CREATE TABLE IF NOT EXISTS faces (content TEXT PRIMARY KEY, finder TEXT NOT NULL, x REAL, y REAL)"
_KNOWN = "LEFT JOIN faces ON faces.content = used.content AND faces.finder = ?"

Middle = tuple[float, float]  # of a face, as shares of the picture's width and height from its top left corner
Detector = Callable[[Image.Image], Middle | None]


class CascadeDetector:
    """The middle of the largest face of a picture. Threads may share one; each loads the cascades for itself."""

    def __init__(self) -> None:
        import cv2

        self._library: Any = cv2
        self._library.setNumThreads(1)  # pictures are looked at in threads already
        self._of_thread = threading.local()

    def __call__(self, image: Image.Image) -> Middle | None:
        grey = np.asarray(image.convert("L"))
        frontal, profile = self._cascades()
        found = _boxes(frontal, grey)
        if not found:
            width = grey.shape[1]
            mirrored = _boxes(profile, np.ascontiguousarray(grey[:, ::-1]))
            found = [*_boxes(profile, grey), *((width - x - w, y, w, h) for x, y, w, h in mirrored)]
        if not found:
            return None
        x, y, w, h = max(found, key=lambda box: (box[2] * box[3], -box[1], -box[0]))
        return (x + w / 2) / grey.shape[1], (y + h / 2) / grey.shape[0]

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
    """Look for a face in every used picture of a data set that nobody has looked at. => how many pictures were opened.

    `detector` is made only when there is a picture to look at. Killed at any moment it loses at most `_BLOCK` pictures.
    Interrupted, after keeping what was found, when `should_stop()` turns true; StorageError when the store fails.
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

    def look(picture: tuple[int, str, int, int]) -> tuple[int, str, Middle | None] | None:
        return None if should_stop() else _look(backend, finder, *picture)

    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="faces") as pool:
        for block in _blocks(pending):
            _keep(catalogue, [found for found in pool.map(look, block) if found is not None])
            if should_stop():
                raise Interrupted("stopped while faces were looked for; what has been found is kept, start again to go on")
            done += len(block)
            if on_progress is not None:
                on_progress(done, len(pending))
    return done


def face_middles(catalogue: Catalogue, dataset: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) shares from the left and from the top of each used picture, in key order; NaN where no face was found."""
    with catalogue.transaction() as database:
        database.execute(_TABLE)
        rows = database.execute(f"SELECT faces.x, faces.y FROM used {_KNOWN} WHERE used.dataset = ? ORDER BY used.key", (FINDER, dataset))
        middles = np.array([(np.nan, np.nan) if x is None else (x, y) for x, y in rows], np.float64).reshape(-1, 2)
    return middles[:, 0].copy(), middles[:, 1].copy()


def _look(backend: SourceBackend, finder: Detector, row: int, key: str, width: int, height: int) -> tuple[int, str, Middle | None] | None:
    """Row, content and face of one picture; None for a file that cannot be opened, which encoding will report."""
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
        face = None  # as above: it is left out when it is encoded
    return row, hashlib.sha256(data).hexdigest(), face


def _keep(catalogue: Catalogue, found: list[tuple[int, str, Middle | None]]) -> None:
    catalogue.set_content((row, content) for row, content, _ in found)
    with catalogue.transaction() as database:
        database.executemany(
            "INSERT OR REPLACE INTO faces VALUES (?, ?, ?, ?)", ((content, FINDER, *(face or (None, None))) for _, content, face in found)
        )


def _blocks(pending: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(pending), _BLOCK):
        yield pending[start : start + _BLOCK]


def _boxes(cascade: Any, grey: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of what the cascade takes for faces."""
    smallest = min(grey.shape) // _SMALLEST
    found = cascade.detectMultiScale(grey, _SCALE, _NEIGHBOURS, minSize=(smallest, smallest))
    return [(int(x), int(y), int(w), int(h)) for x, y, w, h in found]
