"""What encoding images and encoding captions have in common.

The last bits of an encoder's output depend on what else is in the batch. So batches are cut from the plan, not from what is missing:
where one member is missing, its whole batch is encoded and only the missing member is kept.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers.data.base.workers import Workers
from helpers.data.cache.cache import SEAL_AFTER_SECONDS

WRITES_AHEAD = 4  # batches that may wait for the writer: bounds memory

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# The answers of `Cache.changed_fact`, in words for the user.
REASONS = {
    "new": "new",
    "lost": "lost from the cache",
    "image": "changed image",
    "encoder": "other encoder",
    "geometry": "other size or crop",
    "precision": "other cache precision",
    "condition": "other conditions",
    "mask": "other masks",
}


@dataclass(frozen=True)
class EncodeOptions:
    """How this process encodes into caches. Batch i belongs to process i mod `workers.world_size`."""

    batch_size: int
    cache_dtype: str = "auto"  # auto, fp16, bf16 or fp32
    threads: int = 2  # read, decode and resize images
    workers: Workers = field(default_factory=Workers)
    seal_after: float = SEAL_AFTER_SECONDS  # seconds until new records become durable, and visible to other processes
    progress: Callable[[int], None] = lambda done: None  # called with the number of images or captions just done


@dataclass
class EncodeTotals:
    """How much this process encoded, why, and how long it took."""

    encoded: int = 0
    why: Counter[str] = field(default_factory=Counter)  # reasons (`REASONS`) => number of encoded records
    failed: int = 0  # could not be encoded
    encoding_seconds: float = 0.0
    waiting_seconds: float = 0.0  # until images were read, decoded and resized

    def count(self, fact: str) -> None:
        """Count one encoded record; `fact` is what `Cache.changed_fact` said of it."""
        self.encoded += 1
        self.why[REASONS[fact]] += 1

    def describe(self, needed: int, encoder: str) -> str:
        """One line, such as `377 needed, 300 cached; 77 encoded in 41 s (1.9/s, limited by encoding): 70 new, 7 changed image`."""
        line = f"{needed:,} needed, {needed - self.encoded - self.failed:,} cached"
        if not self.encoded:
            return line
        seconds = max(self.encoding_seconds + self.waiting_seconds, 1e-3)
        limit = encoder if self.encoding_seconds >= self.waiting_seconds else "reading and resizing"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.why.most_common())
        return f"{line}; {self.encoded:,} encoded in {seconds:.0f} s ({self.encoded / seconds:,.1f}/s, limited by {limit}): {reasons}"


def totals_of_all(mine: Sequence[EncodeTotals], workers: Workers) -> EncodeTotals:
    """The sum of this process's totals and those of all others, each of which must call this. All work at the same time, so the
    seconds are those of the slowest process."""
    texts = workers.gather(json.dumps([vars(part) for part in mine]))
    shares = [[EncodeTotals(**values) for values in json.loads(text)] for text in texts]
    total = EncodeTotals()
    for part in itertools.chain(*shares):
        total.encoded += part.encoded
        total.why.update(part.why)
        total.failed += part.failed
    total.encoding_seconds = max(sum(part.encoding_seconds for part in share) for share in shares)
    total.waiting_seconds = max(sum(part.waiting_seconds for part in share) for share in shares)
    return total


def stored(tensor: Tensor, cache_dtype: str) -> Tensor:
    """A tensor in the precision of the cache. `auto` keeps bfloat16, whose range T5 needs, and makes other floats float16."""
    if not tensor.is_floating_point():
        return tensor
    if cache_dtype == "auto":
        return tensor if tensor.dtype == torch.bfloat16 else tensor.to(torch.float16)
    return tensor.to(DTYPES[cache_dtype])


def is_finite(record: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in record.values())


@contextmanager
def background_writes() -> Iterator[Callable[..., None]]:
    """Yields a function that calls another one in a background thread, in order; it blocks while `WRITES_AHEAD` calls are pending.

    An error there is raised by a later call or on leaving, after all pending calls have ended.
    """
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:

        def submit(function: Callable[..., None], *arguments: object) -> None:
            pending.append(pool.submit(function, *arguments))
            while len(pending) > WRITES_AHEAD:
                pending.popleft().result()

        try:
            yield submit
        finally:
            while pending:
                pending.popleft().result()


def available_threads() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
