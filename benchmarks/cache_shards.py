"""How fast cached tensors are written and read, beside what the checksum alone allows, and what they take on disk.

    python -m benchmarks.cache_shards [--mebibytes 256] [--rounds 5] [--profile]

Records of 32 KiB are SDXL latents of 512 pixels, of 128 KiB those of 1024, of 300 KiB its text tensors. Writing seals shards and
fills the index; reading comes from the page cache, in random order, each record checked and copied. Gates are in MiB a second, and in
records a second for the small ones; bytes on disk are those of shards and index, for a byte of payload.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import Figure, compared, conclude, parser, profile
from helpers.data.cache import Cache, Writer, record_key

LEAST_WRITTEN, LEAST_READ = 350.0, 1500.0  # MiB/s
LEAST_RECORDS = {32: (8_000, 45_000)}  # KiB of a record => records written and read a second
MOST_ON_DISK = 1.05  # bytes for a byte of payload
KIBIBYTES = (32, 128, 300)


class Round(NamedTuple):
    """Records a second, and bytes on disk for a byte of payload."""

    written: float
    read: float
    checksummed: float
    on_disk: float


def measure(folder: Path, kibibytes: int, mebibytes: int) -> Round:
    """One round: a new cache is filled and read once over."""
    count = mebibytes * 1024 // kibibytes
    latents = torch.randn(64, 4, kibibytes * 4, 32).half()
    keys = [record_key(str(number)) for number in range(count)]
    cache = Cache(folder / "cache")
    began = time.perf_counter()
    with Writer(cache) as writer:
        for number, key in enumerate(keys):
            writer.add(key, {"mean": latents[number % 64]}, f"image {number}", {"image": key.hex()})
    written = count / (time.perf_counter() - began)
    locations = cache.find(random.sample(keys, count))
    began = time.perf_counter()
    for location in locations:
        cache.read(location)
    read = count / (time.perf_counter() - began)
    cache.close()
    on_disk = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    shutil.rmtree(folder / "cache")
    payload = latents[0].numpy().tobytes()
    return Round(written, read, checksum(payload, count), on_disk / (count * len(payload)))


def checksum(payload: bytes, count: int) -> float:
    """Payloads a second that zlib takes the crc32 of: as fast as any checked reading can be."""
    began = time.perf_counter()
    for _ in range(count):
        zlib.crc32(payload)
    return count / (time.perf_counter() - began)


def figures_of(kibibytes: int, rounds: Sequence[Round]) -> list[Figure]:
    written, read = (statistics.median(getattr(each, name) for each in rounds) for name in ("written", "read"))
    mebibytes = kibibytes / 1024
    beside = compared(
        f"{kibibytes} KiB read, beside crc32 alone", "MiB/s", [(r.checksummed * mebibytes, r.read * mebibytes) for r in rounds]
    )
    figures = [
        Figure(f"{kibibytes} KiB written", written * mebibytes, "MiB/s", at_least=LEAST_WRITTEN),
        Figure(f"{kibibytes} KiB read and checked", read * mebibytes, "MiB/s", at_least=LEAST_READ),
        beside,
        Figure(f"{kibibytes} KiB on disk", statistics.median(each.on_disk for each in rounds), "x payload", at_most=MOST_ON_DISK),
    ]
    if kibibytes in LEAST_RECORDS:
        least_written, least_read = LEAST_RECORDS[kibibytes]
        figures += [
            Figure(f"{kibibytes} KiB records written", written, "/s", at_least=least_written),
            Figure(f"{kibibytes} KiB records read", read, "/s", at_least=least_read),
        ]
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--mebibytes", type=int, default=256, help="payload of a round")
    options.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for kibibytes in KIBIBYTES:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            one = partial(measure, Path(folder), kibibytes, chosen.mebibytes)
            figures += figures_of(kibibytes, [one() for _ in range(chosen.rounds)])
            if chosen.profile:
                profile(f"writing and reading, then crc32 alone, {kibibytes} KiB", one)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
