"""How fast cached tensors are written and read, beside what disk and checksum alone allow, and what they take on disk.

    python -m benchmarks.cache_shards [--mebibytes 256] [--rounds 5] [--profile]

Records of 32 KiB are SDXL latents of 512 pixels, of 128 KiB those of 1024, of 300 KiB its text tensors. Writing checks, seals shards
and fills the index; beside it stands a plain file of the same bytes, synced as often, with a crc32 of each record. Reading comes from
the page cache, in random order, each record checked and copied; beside it stands crc32 alone. Reading needs no disk and is told by
seconds of processor time. Gates are in MiB a second, and for the small records in records a second. Bytes on disk are those of shards
and index, for a byte of payload.
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
LEAST_RECORDS = {32: (8_000, 45_000)}  # KiB of a record => records written and read a second
MOST_ON_DISK = 1.05  # bytes for a byte of payload
KIBIBYTES = (32, 128, 300)


class Round(NamedTuple):
    """Records a second, and bytes on disk for a byte of payload."""

    written: float
    written_plainly: float
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
    """Payloads a second into a file by hand, each with its crc32, synced when as much has been written as a shard holds."""
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
    """Payloads a second of processor time that zlib takes the crc32 of: as fast as any checked reading can be."""
    began = time.process_time()
    for _ in range(count):
        zlib.crc32(payload)
    return count / (time.process_time() - began)


def figures_of(kibibytes: int, rounds: Sequence[Round]) -> list[Figure]:
    """Rates in MiB a second with their gates, and in records where those are gated too."""
    name, mebibytes = f"{kibibytes} KiB", kibibytes / 1024
    writes = [(each.written_plainly * mebibytes, each.written * mebibytes) for each in rounds]
    reads = [(each.checksummed * mebibytes, each.read * mebibytes) for each in rounds]
    written = compared(f"{name} written, beside a plain file", "MiB/s", writes, at_least=LEAST_WRITTEN, gates_value=True)
    read = compared(f"{name} read, beside crc32 alone", "MiB/s", reads, at_least=LEAST_READ, gates_value=True)
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
                profile(f"a round of {kibibytes} KiB, the plain file and crc32 at its end", one)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
