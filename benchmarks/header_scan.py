"""How many images per second a scan reads on one core, compared with Pillow only opening them.

    python -m benchmarks.header_scan [--images 5000] [--threads 8] [--rounds 5] [--profile]

A scan lists the files, reads size and orientation from each header, and stores them in the catalogue; no pixel is decoded. A second scan of
the same folder opens nothing. These rates are per second of CPU time, over all threads. Then the same folder simulates remote storage:
every file answers after 5 ms, and the scan is measured in wall-clock time.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from benchmarks.measure import Figure, compared, conclude, in_turns, parser, profile
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, ScanOptions, scan
from helpers.data.plan.targets import ResolutionRule
from helpers.storage.local import LocalSource

LEAST_SCANNED = 5_000  # images per second on one core
FAR_SECONDS = 0.005  # latency of a file in a network folder
LEAST_AT_ONCE = 10  # files in such a folder
RULES = DatasetRules("benchmark", ResolutionRule(), CaptionRule(strategy="filename"))


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 1200x800 with EXIF, as a camera writes them: one image under many names."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated
    first = folder / "image_000000.jpg"
    Image.fromarray(noise).resize((1200, 800)).save(first, quality=85, exif=exif)
    for number in range(1, count):
        shutil.copyfile(first, folder / f"image_{number:06}.jpg")


def opened(folder: Path) -> float:
    """Images that Pillow opens in a plain loop, per second of CPU time."""
    paths = sorted(folder.iterdir())
    began = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (1200, 800)
    return len(paths) / (time.process_time() - began)


class FarSource(LocalSource):
    """A folder whose files answer after a delay, however many are requested at once."""

    def open(self, key: str) -> BinaryIO:
        time.sleep(FAR_SECONDS)
        return super().open(key)


class Scans:
    """Scans a folder into a new catalogue each time. `warm` has the rates of the second scan into each catalogue."""

    def __init__(self, folder: Path, catalogues: Path, threads: int | None = None) -> None:
        self.folder, self.catalogues, self.threads = folder, catalogues, threads
        self.warm: list[float] = []

    def cold(self) -> float:
        """Images per second of CPU time."""
        with Catalogue(self.catalogues / f"{len(self.warm)}.sqlite") as catalogue:
            began = time.process_time()
            result = scan(LocalSource(self.folder), RULES, catalogue, ScanOptions(self.threads))
            rate = result.used / (time.process_time() - began)
            began = time.process_time()
            assert scan(LocalSource(self.folder), RULES, catalogue).opened == 0
            self.warm.append(result.used / (time.process_time() - began))
        return rate

    def far(self) -> float:
        """Images per second of wall-clock time, from remote storage."""
        name = f"far-{len(list(self.catalogues.glob('far-*.sqlite')))}.sqlite"
        with Catalogue(self.catalogues / name) as catalogue:
            began = time.perf_counter()
            result = scan(FarSource(self.folder), RULES, catalogue, ScanOptions(self.threads))
            return result.used / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=5_000)
    options.add_argument("--threads", type=int, help="reading threads (default: as in a run)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        make_images(folder, chosen.images)
        scans = Scans(folder, Path(place), chosen.threads)
        rounds = in_turns(chosen.rounds, lambda: opened(folder), scans.cold)
        beside = compared("scanned, compared with Pillow opening them", "/s", rounds, at_least=LEAST_SCANNED, gates_value=True)
        far = [(1 / FAR_SECONDS, scans.far()) for _ in range(chosen.rounds)]
        figures = [
            beside,
            Figure("scanned again, none opened", statistics.median(scans.warm), "/s"),
            compared("scanned from remote storage, compared with one file after another", "/s", far, at_least=LEAST_AT_ONCE),
        ]
        if chosen.profile:
            profile("Pillow opening", lambda: opened(folder))
            profile("a scan (its main thread) and a warm one", scans.cold)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
