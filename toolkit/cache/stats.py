"""The content of a cache in numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from toolkit.cache.view import CacheView


def describe(folder: Path) -> Iterator[str]:
    """Lines to print: records and bytes, shards, tensor shapes, encoders and precisions. DataError if there is no index."""
    with CacheView(folder) as view:
        shards = view.shards()
        records, payload = Counter[str](), Counter[str]()
        for shard in shards:
            for placed in view.records(shard):
                records[placed.layout] += 1
                payload[placed.layout] += placed.size
        encoders = Counter((facts.get("encoder", "?"), facts.get("precision", "?")) for _, facts in view.origins())
        strays = view.strays()
        elsewhere, stored_in = view.elsewhere(), view.stored_in
    whole = sum(shard.size for shard in shards)
    here = whole - sum(shard.size for shard in elsewhere)
    place = f"in {stored_in}; local copies of {len(shards) - len(elsewhere):,}, {here / 1e6:,.2f} MB" if stored_in else "on disk"
    yield f"{folder}"
    yield f"  records   {records.total():,}, {payload.total() / 1e6:,.2f} MB"
    yield f"  shards    {len(shards):,}, {whole / 1e6:,.2f} MB {place}; {len(strays):,} not in the index"
    for layout, count in records.most_common():
        yield f"  shape     {shape_of(layout)}: {count:,} records, {payload[layout] / 1e6:,.2f} MB"
    for (encoder, precision), count in encoders.most_common():
        yield f"  encoder   {encoder}, precision {precision}: the latest record of {count:,} images or captions"


def shape_of(layout: str) -> str:
    """`mean 4x64x64 F16, std 4x64x64 F16` for a layout as `CacheView.records` gives it."""
    if not layout:
        return "unknown, because the entry in the index is damaged"
    parts = [part for part in json.loads(layout) if part[0] != "padding"]
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'} {dtype}" for name, dtype, shape in parts)
