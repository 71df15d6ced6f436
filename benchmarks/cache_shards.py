"""How fast cached tensors are written and read, beside what the checksum alone allows.

    python benchmarks/cache_shards.py [--mebibytes 256] [--rounds 5] [--folder FOLDER]

Run with OMP_NUM_THREADS=1. Reads come from the page cache, in random order, each checked and copied. Exits 1 below a limit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from helpers.data.cache import Cache, Writer, record_key

LEAST_WRITTEN, LEAST_READ = 350.0, 1500.0  # MiB/s
LEAST_RECORDS = {32: (8_000, 45_000)}  # KiB of a record => records written and read a second
MOST_OVERHEAD = 1.05  # bytes on disk for a byte of payload


class Round(NamedTuple):
    """Records a second, and bytes on disk for a byte of payload."""

    written: float
    read: float
    checksummed: float
    overhead: float


def measure(folder: Path, kibibytes: int, mebibytes: int) -> Round:
    """One round: a new cache is filled and read once over."""
    count = mebibytes * 1024 // kibibytes
    latents = torch.randn(64, 4, kibibytes * 4, 32).half()
    keys = [record_key(str(number)) for number in range(count)]
    cache = Cache(folder / "cache")
    started = time.perf_counter()
    with Writer(cache) as writer:
        for number, key in enumerate(keys):
            writer.add(key, {"mean": latents[number % 64]}, f"image {number}", {"image": key.hex()})
    written = count / (time.perf_counter() - started)
    locations = cache.find(random.sample(keys, count))
    started = time.perf_counter()
    for location in locations:
        cache.read(location)
    read = count / (time.perf_counter() - started)
    payload = latents[0].numpy().tobytes()
    started = time.perf_counter()
    for _ in range(count):
        zlib.crc32(payload)
    checksummed = count / (time.perf_counter() - started)
    cache.close()
    on_disk = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    shutil.rmtree(folder / "cache")
    return Round(written, read, checksummed, on_disk / (count * len(payload)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mebibytes", type=int, default=256, help="payload of a round")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    chosen = options.parse_args()
    kept = True
    print(f"{'record':>8} {'written/s':>18} {'read and checked/s':>20} {'crc32 alone/s':>15} {'on disk':>8}  limits")
    for kibibytes in (32, 128, 300):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            rounds = [measure(Path(folder), kibibytes, chosen.mebibytes) for _ in range(chosen.rounds)]
        middle = Round(*(statistics.median(values) for values in zip(*rounds, strict=True)))
        written, read = middle.written * kibibytes / 1024, middle.read * kibibytes / 1024
        least_written, least_read = LEAST_RECORDS.get(kibibytes, (0, 0))
        fine = (
            written >= LEAST_WRITTEN
            and read >= LEAST_READ
            and middle.written >= least_written
            and middle.read >= least_read
            and middle.overhead <= MOST_OVERHEAD
        )
        kept &= fine
        print(
            f"{kibibytes:>4} KiB {middle.written:>8,.0f} ({written:>5,.0f} MiB) {middle.read:>9,.0f} ({read:>5,.0f} MiB)"
            f" {middle.checksummed:>15,.0f} {middle.overhead:>7.3f}x  {'kept' if fine else 'MISSED'}"
        )
    print(
        f"limits: {LEAST_WRITTEN:.0f} MiB/s written, {LEAST_READ:.0f} MiB/s read, at 32 KiB 8,000/s and 45,000/s, {MOST_OVERHEAD}x on disk;"
        f" medians of {chosen.rounds}"
    )
    sys.exit(not kept)


if __name__ == "__main__":
    main()
