"""Loss masks as the scan sees them: how much of each is white. Each is decoded once; the result is stored by the hash of its bytes.

A mask is an image file of its own, whose brightness counts, or the alpha channel of the image itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from helpers.data.base.images import ImageError, decode_alpha, decode_mask
from helpers.data.catalogue.catalogue import Catalogue, joined_companions
from helpers.errors import Interrupted, StorageError
from helpers.storage.backend import SourceBackend

BRIGHTNESS, ALPHA = "brightness", "alpha"  # what of a file is the mask
VERSION = 1  # raise it when the measurement changes: all masks are then measured again
DIM = 128  # a mask whose brightest pixel is below this was hardly meant to be one: labels of 0 and 1, for example

_BLOCK = 256  # masks per transaction: a kill loses at most these


def known_masks(images: str, are_alpha: bool) -> str:
    """SQL of what is known about the masks of the images in a table, for a query with `joined_companions`."""
    content, source = (f"{images}.content", ALPHA) if are_alpha else ("mask.content", BRIGHTNESS)
    return f"masks known ON known.content = {content} AND known.source = '{source}' AND known.version = {VERSION}"


@dataclass(frozen=True)
class Measured:
    """One mask. `mean` is that of its pixels, from 0 (black) to 1 (white); None where an image has no alpha channel."""

    content: str  # SHA-256 of the file
    mean: float | None = None
    brightest: int | None = None  # pixel, from 0 to 255
    problem: str | None = None  # why it cannot be decoded


def measure_masks(
    backend: SourceBackend,
    dataset: str,
    source: str,
    catalogue: Catalogue,
    *,
    threads: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Measure every image file of a dataset that has not been measured yet, as a mask. Returns the number of files that were read.

    A kill loses at most `_BLOCK` files. If `should_stop()` becomes true, the results so far are stored and Interrupted is raised.
    StorageError if the source fails.
    """
    with catalogue.transaction() as database:
        pending = database.execute(
            "SELECT files.id, files.key FROM files LEFT JOIN masks ON masks.content = files.content AND masks.source = ?"
            " AND masks.version = ? WHERE files.dataset = ? AND kind = 'image' AND files.problem IS NULL AND masks.content IS NULL"
            " ORDER BY files.id",
            (source, VERSION, dataset),
        ).fetchall()

    def measure(file: tuple[int, str]) -> tuple[int, Measured] | None:
        found = None if should_stop() else _measured(backend, source, file[1])
        return None if found is None else (file[0], found)

    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="masks") as pool:
        for start in range(0, len(pending), _BLOCK):
            block = pending[start : start + _BLOCK]
            _store(catalogue, source, [found for found in pool.map(measure, block) if found is not None])
            if should_stop():
                raise Interrupted("stopped while masks were measured; start again to continue")
            done += len(block)
            on_progress(done, len(pending))
    return done


def measured_masks(catalogue: Catalogue, dataset: str, source: str) -> list[tuple[str, float | None, int | None]]:
    """(key, mean, brightest pixel) of the mask of each image in use, in key order; see `Measured`."""
    with catalogue.transaction() as database:
        return database.execute(
            f"SELECT used.key, known.mean, known.brightest FROM used {joined_companions('used')}"
            f" LEFT JOIN {known_masks('used', source == ALPHA)} WHERE used.dataset = ? ORDER BY used.key",
            (dataset,),
        ).fetchall()


def _measured(backend: SourceBackend, source: str, key: str) -> Measured | None:
    """One file. None where it cannot be opened, which encoding will report."""
    try:
        data = backend.read(key)
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise StorageError(f"{backend.name}: {key} could not be read: {error.strerror or error}") from error
    content = hashlib.sha256(data).hexdigest()
    try:
        mask = decode_alpha(data) if source == ALPHA else decode_mask(data)
    except ImageError as error:
        return Measured(content, problem=str(error))
    if mask is None:
        return Measured(content)
    pixels = np.asarray(mask)
    return Measured(content, float(pixels.mean()) / 255, int(pixels.max()))


def _store(catalogue: Catalogue, source: str, found: Sequence[tuple[int, Measured]]) -> None:
    catalogue.set_content((row, mask.content) for row, mask in found)
    with catalogue.transaction() as database:
        database.executemany(
            "INSERT OR REPLACE INTO masks (content, source, version, mean, brightest, problem) VALUES (?, ?, ?, ?, ?, ?)",
            ((mask.content, source, VERSION, mask.mean, mask.brightest, mask.problem) for _, mask in found),
        )


def problem_of_mask(mean: float | None, problem: str | None, is_alpha: bool) -> str | None:
    """The reason why an image with this mask is left out, as "kind: detail", or None."""
    if problem is not None:
        return problem if is_alpha else f"mask {problem}"
    if mean == 0:
        what = "the alpha channel is transparent everywhere" if is_alpha else "it has no white"
        return f"black mask: {what}, so there is nothing to train"
    return None
