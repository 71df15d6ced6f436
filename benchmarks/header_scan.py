"""How many images a second a scan takes in on one core, beside Pillow merely opening them.

    python -m benchmarks.header_scan [--images 5000] [--threads 8] [--rounds 5] [--profile]

A scan lists the files, reads each header for size and orientation, and keeps it in the catalogue; no pixel is decoded. A second
scan of the same folder opens nothing. Seconds of a core are seconds of processor time, over all threads. Then the same folder as if
it were far away: every file answers after 5 ms, and a scan is timed by the clock.
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

LEAST_SCANNED = 5_000  # images a second of one core
FAR_SECONDS = 0.005  # until a file of a folder on a network answers
LEAST_AT_ONCE = 10  # files of such a folder
RULES = DatasetRules("benchmark", ResolutionRule(), CaptionRule(strategy="filename"))


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 1200x800 as a camera writes them, with EXIF: one picture under many names."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    first = folder / "image_000000.jpg"
    Image.fromarray(noise).resize((1200, 800)).save(first, quality=85, exif=exif)
    for number in range(1, count):
        shutil.copyfile(first, folder / f"image_{number:06}.jpg")


def opened(folder: Path) -> float:
    """Images a second of processor time that Pillow opens in a plain loop."""
    paths = sorted(folder.iterdir())
    began = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (1200, 800)
    return len(paths) / (time.process_time() - began)


class FarSource(LocalSource):
    """A folder whose files take a while to answer, however many are asked for at once."""

    def open(self, key: str) -> BinaryIO:
        time.sleep(FAR_SECONDS)
        return super().open(key)


class Scans:
    """Scans of one folder into a new catalogue each; `warm` keeps the rates of the second scan into each."""

    def __init__(self, folder: Path, catalogues: Path, threads: int | None = None) -> None:
        self.folder, self.catalogues, self.threads = folder, catalogues, threads
        self.warm: list[float] = []

    def cold(self) -> float:
        """Images a second of processor time."""
        with Catalogue(self.catalogues / f"{len(self.warm)}.sqlite") as catalogue:
            began = time.process_time()
            result = scan(LocalSource(self.folder), RULES, catalogue, ScanOptions(self.threads))
            rate = result.used / (time.process_time() - began)
            began = time.process_time()
            assert scan(LocalSource(self.folder), RULES, catalogue).opened == 0
            self.warm.append(result.used / (time.process_time() - began))
        return rate

    def far(self) -> float:
        """Images a second by the clock, from a folder that is far away."""
        name = f"far-{len(list(self.catalogues.glob('far-*.sqlite')))}.sqlite"
        with Catalogue(self.catalogues / name) as catalogue:
            began = time.perf_counter()
            result = scan(FarSource(self.folder), RULES, catalogue, ScanOptions(self.threads))
            return result.used / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=5_000)
    options.add_argument("--threads", type=int, help="that read (default: as a run does)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        make_images(folder, chosen.images)
        scans = Scans(folder, Path(place), chosen.threads)
        rounds = in_turns(chosen.rounds, lambda: opened(folder), scans.cold)
        beside = compared("scanned, beside Pillow opening them", "/s", rounds, at_least=LEAST_SCANNED, gates_value=True)
        far = [(1 / FAR_SECONDS, scans.far()) for _ in range(chosen.rounds)]
        figures = [
            beside,
            Figure("scanned again, none opened", statistics.median(scans.warm), "/s"),
            compared("scanned far away, beside one file after another", "/s", far, at_least=LEAST_AT_ONCE),
        ]
        if chosen.profile:
            profile("Pillow opening", lambda: opened(folder))
            profile("a scan (its main thread) and a warm one", scans.cold)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
