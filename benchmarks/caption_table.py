"""How long it takes to read captions and sizes of a million images from a Parquet table, and how much memory.

    python -m benchmarks.caption_table [--rows 1000000] [--rounds 1]

The listing of files is synthetic and needs no disk, so only our code is measured: storing the listing, reading and joining the table, and
checking every image. The limit for reading is pyarrow converting the same columns to Python values. Of the images, at most MOST_OPENED are
opened, whose headers are compared with the table. Seconds are CPU time over all threads; memory is the increase of the process's peak.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Figure, compared, conclude, parser, profile
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, scan
from helpers.data.catalogue.table_join import join_tables
from helpers.data.catalogue.tables import TableRule
from helpers.data.plan.buckets import ResolutionRule
from helpers.storage.backend import Entry

MOST_MICROSECONDS = 20.0  # reading and joining, per row
MOST_BYTES = 500.0  # memory per row; a Python object with a caption needs more
MOST_OPENED = 64  # images, however many there are
BLOCK = 50_000  # rows written at a time


def key(number: int) -> str:
    return f"folder_{number // 1000:04}/image_{number:07}.jpg"


def write_table(path: Path, rows: int) -> None:
    """A table with a name, a caption and a size for every image, in another order than the listing."""
    stride = 7919 if rows % 7919 else 1  # a prime
    with pq.ParquetWriter(path, schema()) as writer:
        for start in range(0, rows, BLOCK):
            numbers = [place * stride % rows for place in range(start, min(start + BLOCK, rows))]
            captions = [f"caption number {number}: a photograph of a street with people, some of them walking" for number in numbers]
            sizes = [640 + number % 512 for number in numbers], [480 + number % 300 for number in numbers]
            writer.write_table(pa.table([list(map(key, numbers)), captions, *sizes], schema=schema()))


def schema() -> pa.Schema:
    return pa.schema([("id", pa.string()), ("description", pa.string()), ("width", pa.int32()), ("height", pa.int32())])


@dataclass(frozen=True)
class Listing:
    """A source with a given number of images, none of which can be opened. `asked` are the keys of those that were tried."""

    images: int
    name: str = "listing"
    asked: list[str] = field(default_factory=list)

    def list(self) -> Iterator[Entry]:
        return (Entry(key(number), 1000 + number, 1) for number in range(self.images))

    def open(self, key: str) -> BinaryIO:
        self.asked.append(key)
        raise FileNotFoundError(key)

    def read(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read")


@dataclass(frozen=True)
class Measured:
    """Seconds of CPU time for all rows."""

    scanned: float  # a complete scan into a new catalogue
    joined: float  # only reading and joining
    again: float  # a second scan without changes


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def values_only(table: Path) -> float:
    """Seconds that pyarrow takes to convert the columns to Python values."""
    return seconds(lambda: [column.to_pylist() for batch in pq.ParquetFile(table).iter_batches() for column in batch.columns])


def measure(table: Path, rows: int, catalogue: Path) -> Measured:
    """Measure a scan into a new catalogue, a second scan, and the join alone."""
    rule = TableRule(str(table), "parquet", caption_column="description", width_column="width", height_column="height")
    rules = DatasetRules("benchmark", ResolutionRule(), CaptionRule("parquet"), (rule,))
    with Catalogue(catalogue) as opened:
        listing = Listing(rows)
        scanned = seconds(lambda: scan(listing, rules, opened))
        assert len(listing.asked) <= MOST_OPENED
        listing.asked.clear()
        again = seconds(lambda: scan(listing, rules, opened))
        assert not listing.asked
        assert opened.totals("benchmark")[0] == rows
        with opened.transaction() as database:
            database.execute("DELETE FROM joined")
        joined = seconds(lambda: join_tables(Listing(rows), "benchmark", (rule,), opened))
    return Measured(scanned, joined, again)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(rounds=1)
    options.add_argument("--rows", type=int, default=1_000_000)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.parquet"
        write_table(table, chosen.rows)
        measure(table, min(chosen.rows, 1000), Path(place) / "small.sqlite")  # loads the libraries
        before = peak_bytes()
        all_measured = [measure(table, chosen.rows, Path(place) / f"{number}.sqlite") for number in range(chosen.rounds)]
        risen = (peak_bytes() - before) / chosen.rows
        rounds = [(values_only(table) / chosen.rows * 1e6, each.joined / chosen.rows * 1e6) for each in all_measured]
        figures = [
            compared("a row read and joined, compared with pyarrow reading it", "µs", rounds, at_most=MOST_MICROSECONDS, gates_value=True),
            Figure("all rows read and joined", statistics.median(each.joined for each in all_measured), "s"),
            Figure("scanned: listed, joined and checked", statistics.median(each.scanned for each in all_measured), "s"),
            Figure("scanned again, nothing read", statistics.median(each.again for each in all_measured), "s"),
            Figure("memory per row", risen, "bytes", at_most=MOST_BYTES),
        ]
        if chosen.profile:
            profile("a scan", lambda: measure(table, chosen.rows, Path(place) / "profiled.sqlite"))
            profile("pyarrow", lambda: values_only(table))
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
