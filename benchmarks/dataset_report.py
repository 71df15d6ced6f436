"""How long the dataset report takes, and how large its HTML page becomes.

    python -m benchmarks.dataset_report [--images 1000000] [--rounds 5] [--profile]

The numbers and the page are made twice from a catalogue of many images, each with a different caption, and a tenth as many left-out files:
cold, when captions are tokenized with SDXL's tokenizers, and warm, when their lengths are known. The thumbnails are made from photographs
of 12 megapixels: cold, when the files are read, and warm. They are compared with a bare loop that decodes the same photographs; ours also
resizes and crops them as for training, shrinks them and encodes them as JPEG.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks.material import caption, write_photographs
from benchmarks.measure import Figure, compared, conclude, parser, profile
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, ScanResult, scan
from helpers.data.encode.common import available_threads
from helpers.data.plan.buckets import BucketPlan, DatasetColumns, ResolutionRule, plan
from helpers.data.report.dataset_report import caption_report, dataset_report
from helpers.data.report.survey import Thumbnail
from helpers.data.report.thumbnails import PER_DATASET, thumbnails
from helpers.families.text.clip import ClipCaptionLengths
from helpers.reporting.html_report import page
from helpers.storage.local import LocalSource
from helpers.storage.memo import Memo

TOKENIZERS = Path(__file__).resolve().parent.parent / "demo" / "model"
PHOTOGRAPH = (4000, 3000)
RULE = ResolutionRule()
MOST_SECONDS = 15.0  # for a million images, cold; scanning them takes minutes
MOST_BYTES = 2e6


@dataclass
class Report:
    """A catalogue of images that do not exist, and the report and page about them."""

    catalogue: Catalogue
    planned: BucketPlan
    result: ScanResult
    memo: Path

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self.catalogue.close()

    def seconds(self, cold: bool) -> float:
        if cold:
            shutil.rmtree(self.memo, ignore_errors=True)
        began = time.perf_counter()
        told = dataset_report([self.result], self.planned, self.catalogue)
        lengths = ClipCaptionLengths([TOKENIZERS / "tokenizer", TOKENIZERS / "tokenizer_2"], "benchmark")
        told["datasets"][0]["captions"] = caption_report("benchmark", self.catalogue, lengths, Memo(self.memo))
        self.page = page(told, [])
        return time.perf_counter() - began


def many_images(folder: Path, count: int) -> Report:
    catalogue = Catalogue(folder / "many.sqlite")
    columns = "dataset, key, kind, stem, size, modified_ns, etag, was_read, width, height, captions, left_out, content"
    with catalogue.transaction() as database:
        used = (
            ("benchmark", f"{n:07}.jpg", "image", f"{n:07}", n, n, "", 1, 600 + n % 1400, 800)
            + (json.dumps([caption(n)]), None, f"{n - n % 97 // 96:064}")
            for n in range(count)
        )
        lost = (
            ("benchmark", f"{n:07}.png", "image", f"{n:07}", n, n, "", 1, 9, 9, None, "no caption: there is none", None)
            for n in range(count // 10)
        )
        for rows in (used, lost):
            database.executemany(f"INSERT INTO files ({columns}) VALUES ({', '.join('?' * 13)})", rows)
    found = catalogue.columns("benchmark")
    planned = plan([DatasetColumns("benchmark", RULE, found.rows, found.width, found.height)])
    result = ScanResult("benchmark", count + count // 10, count, count // 10, {"no caption": count // 10}, 0, 0, 0, 0)
    return Report(catalogue, planned, result, folder / "memo")


@dataclass
class Sheet:
    """Photographs to make thumbnails of."""

    images: Path
    catalogue: Catalogue
    planned: BucketPlan
    memo: Path

    def seconds(self, cold: bool) -> float:
        if cold:
            shutil.rmtree(self.memo, ignore_errors=True)
        began = time.perf_counter()
        self.made()
        return time.perf_counter() - began

    def made(self) -> list[Thumbnail]:
        return thumbnails(self.planned, [LocalSource(self.images)], self.catalogue, Memo(self.memo), available_threads())

    def bare(self) -> float:
        """Seconds to decode the photographs in as many threads."""
        began = time.perf_counter()
        with ThreadPoolExecutor(available_threads()) as pool:
            list(pool.map(lambda path: Image.open(path).load(), self.images.glob("*.jpg")))
        return time.perf_counter() - began


def photographs(folder: Path, size: tuple[int, int]) -> Sheet:
    images = write_photographs(folder / "images", 2, size)
    for number in range(2, PER_DATASET):
        shutil.copy(images / f"photograph_{number % 2:06}.jpg", images / f"photograph_{number:06}.jpg")
    catalogue = Catalogue(folder / "few.sqlite")
    scan(LocalSource(images), DatasetRules("benchmark", RULE, CaptionRule("filename")), catalogue)
    found = catalogue.columns("benchmark")
    planned = plan([DatasetColumns("benchmark", RULE, found.rows, found.width, found.height)])
    return Sheet(images, catalogue, planned, folder / "memo")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=1_000_000)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        report, sheet = many_images(Path(place), chosen.images), photographs(Path(place), PHOTOGRAPH)
        with report, sheet.catalogue:
            cold, warm = _both(chosen.rounds, report.seconds)
            rounds = [(sheet.bare(), sheet.seconds(cold=True), sheet.seconds(cold=False)) for _ in range(chosen.rounds)]
            figures = [
                Figure(f"numbers and page of {chosen.images:,} images, cold", cold, "s", at_most=MOST_SECONDS),
                Figure("warm", warm, "s"),
                Figure("bytes of that page, without thumbnails", len(report.page.encode()), "B", at_most=MOST_BYTES),
                compared(f"{PER_DATASET} thumbnails, cold", "s", [(bare, ours) for bare, ours, _ in rounds], at_most=3),
                Figure("warm", median(again for _, _, again in rounds), "s"),
            ]
            if chosen.profile:
                profile("the report, warm", lambda: report.seconds(cold=False))
    return conclude(figures, chosen.rounds)


def _both(rounds: int, seconds: Callable[[bool], float]) -> tuple[float, float]:
    """Medians of the cold and the warm times."""
    cold, warm = zip(*((seconds(True), seconds(False)) for _ in range(rounds)), strict=True)
    return median(cold), median(warm)


if __name__ == "__main__":
    sys.exit(main())
