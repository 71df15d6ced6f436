"""How fast cached tensors are written and read, compared with the disk and the checksum alone, and how much disk space they need.

    python -m benchmarks.cache_shards [--mebibytes 256] [--rounds 5] [--profile]

Records of 32 KiB are SDXL latents at 512 pixels, 128 KiB at 1024 pixels, and 300 KiB its text embeddings. Writing checks the data, seals
shards and updates the index. It is compared with a plain file of the same bytes, synced as often, with a crc32 of each record. Reading is
from the page cache, in random order, and each record is checked and copied. It is compared with crc32 alone, in CPU time, because it needs
no disk. Gates are in MiB/s, and for the small records also in records/s. Bytes on disk are those of shards and index, per byte of payload.
"""

from __future__ import annotations

import os
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
from helpers.data.cache.cache import SHARD_BYTES, Cache, Writer, record_key

LEAST_WRITTEN, LEAST_READ = 350.0, 1500.0  # MiB/s
LEAST_RECORDS = {32: (8_000, 45_000)}  # KiB of a record => records written and read per second
MOST_ON_DISK = 1.05  # bytes per byte of payload
KIBIBYTES = (32, 128, 300)


class Round(NamedTuple):
    """Records per second, and bytes on disk per byte of payload."""

    written: float
    written_plainly: float
    read: float
    checksummed: float
    on_disk: float


def measure(folder: Path, kibibytes: int, mebibytes: int) -> Round:
    """One round: fill a new cache and read it once."""
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
    began = time.process_time()
    for location in locations:
        cache.read(location)
    read = count / (time.process_time() - began)
    cache.close()
    on_disk = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    shutil.rmtree(folder / "cache")
    payload = latents[0].numpy().tobytes()
    plainly = write_plainly(folder / "plain", payload, count)
    return Round(written, plainly, read, checksum(payload, count), on_disk / (count * len(payload)))


def write_plainly(path: Path, payload: bytes, count: int) -> float:
    """Payloads per second written to a plain file, each with its crc32, synced after as many bytes as a shard holds."""
    began = time.perf_counter()
    with path.open("wb") as file:
        for number in range(1, count + 1):
            zlib.crc32(payload)
            file.write(payload)
            if number % (SHARD_BYTES // len(payload)) == 0 or number == count:
                file.flush()
                os.fsync(file.fileno())
    rate = count / (time.perf_counter() - began)
    path.unlink()
    return rate


def checksum(payload: bytes, count: int) -> float:
    """Payloads whose crc32 zlib computes per second of CPU time: no checked reading can be faster."""
    began = time.process_time()
    for _ in range(count):
        zlib.crc32(payload)
    return count / (time.process_time() - began)


def figures_of(kibibytes: int, rounds: Sequence[Round]) -> list[Figure]:
    """Rates in MiB/s with their gates, and in records/s where those have gates too."""
    name, mebibytes = f"{kibibytes} KiB", kibibytes / 1024
    writes = [(each.written_plainly * mebibytes, each.written * mebibytes) for each in rounds]
    reads = [(each.checksummed * mebibytes, each.read * mebibytes) for each in rounds]
    written = compared(f"{name} written, compared with a plain file", "MiB/s", writes, at_least=LEAST_WRITTEN, gates_value=True)
    read = compared(f"{name} read, compared with crc32 alone", "MiB/s", reads, at_least=LEAST_READ, gates_value=True)
    on_disk = Figure(f"{name} on disk", statistics.median(each.on_disk for each in rounds), "x payload", at_most=MOST_ON_DISK)
    if kibibytes not in LEAST_RECORDS:
        return [written, read, on_disk]
    least_written, least_read = LEAST_RECORDS[kibibytes]
    return [
        written,
        read,
        on_disk,
        Figure(f"{name} records written", written.value / mebibytes, "/s", at_least=least_written),
        Figure(f"{name} records read", read.value / mebibytes, "/s", at_least=least_read),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--mebibytes", type=int, default=256, help="payload per round")
    options.add_argument("--folder", type=Path, help="folder to write to (default: a temporary folder)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for kibibytes in KIBIBYTES:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            one = partial(measure, Path(folder), kibibytes, chosen.mebibytes)
            figures += figures_of(kibibytes, [one() for _ in range(chosen.rounds)])
            if chosen.profile:
                profile(f"a round of {kibibytes} KiB, the plain file and crc32 at its end", one)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
