"""How many images a second a scan takes in on one core, beside Pillow merely opening them.

    python benchmarks/header_scan.py [--images 5000] [--rounds 5]

A scan lists the files, reads each header for size and orientation, and keeps it in the catalogue; no pixel is decoded. A second
scan of the same folder opens nothing. Exits 1 below the limit.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from helpers.data.buckets import ResolutionRule
from helpers.data.captions import CaptionRule
from helpers.data.catalogue import Catalogue
from helpers.data.scan import DatasetRules, scan
from helpers.storage.local import LocalSource

LEAST_SCANNED = 5_000  # images a second of one core
RULES = DatasetRules("benchmark", ResolutionRule(), CaptionRule(strategy="filename"))


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 1200x800 as a camera writes them, with EXIF: one picture under many names."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    first = folder / "image_000000.jpg"
    Image.fromarray(noise).resize((1200, 800)).save(first, quality=85, exif=exif)
    for number in range(1, count):
        shutil.copyfile(first, folder / f"image_{number:06}.jpg")


def bare(folder: Path) -> float:
    """Images a second of processor time that Pillow opens in a plain loop."""
    paths = sorted(folder.iterdir())
    started = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (1200, 800)
    return len(paths) / (time.process_time() - started)


def scanned(folder: Path, catalogue_file: Path) -> tuple[float, float]:
    """Images a second of processor time of a cold scan, and the seconds of a warm one."""
    with Catalogue(catalogue_file) as catalogue:
        started = time.process_time()
        result = scan(LocalSource(folder), RULES, catalogue)
        cold = result.used / (time.process_time() - started)
        started = time.perf_counter()
        assert scan(LocalSource(folder), RULES, catalogue).opened == 0
        return cold, time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=5_000)
    options.add_argument("--rounds", type=int, default=5)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        make_images(folder, chosen.images)
        rounds = [(bare(folder), *scanned(folder, Path(place) / f"{number}.sqlite")) for number in range(chosen.rounds)]
    opened, cold, warm = (statistics.median(values) for values in zip(*rounds, strict=True))
    kept = cold >= LEAST_SCANNED
    print(f"opened by Pillow alone  {opened:>8,.0f} images/s of a core")
    print(f"scanned, cold           {cold:>8,.0f} images/s of a core; at least {LEAST_SCANNED:,}: {'kept' if kept else 'MISSED'}")
    print(f"scanned again           {warm:>8.2f} s for {chosen.images:,} images, none opened; medians of {chosen.rounds}")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
