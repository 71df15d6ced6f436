"""What filling a cache with latents and with text tensors have in common.

A record's bytes depend in their last bits on what was encoded beside it. So the batches of an encoder are cut from the plan and not
from what happens to be missing: where one member is missing the whole batch is encoded, and the missing member kept.
"""

from __future__ import annotations

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

# What `Cache.changed_fact` says, in words for the user.
REASONS = {
    "new": "new",
    "lost": "lost from the cache",
    "image": "changed image",
    "encoder": "other encoder",
    "geometry": "other size or cut",
    "precision": "other cache precision",
    "condition": "other conditions",
}


@dataclass(frozen=True)
class FillOptions:
    """How a cache is filled, and which part of the work is this process's: the i-th batch belongs to process i mod `world_size`."""

    batch_size: int
    cache_dtype: str = "auto"  # auto, fp16, bf16, fp32
    threads: int = 2  # that read, decode and resize
    rank: int = 0
    world_size: int = 1
    seal_after: float = SEAL_AFTER_SECONDS  # seconds after which what has been encoded becomes durable, and visible to other processes
    should_stop: Callable[[], bool] = lambda: False
    progress: Callable[[int], None] = lambda done: None  # told how many more are done, of those in the batches given


@dataclass
class Filled:
    """What filling came to in this process."""

    encoded: int = 0
    why: Counter[str] = field(default_factory=Counter)  # of the encoded ones, why they were missing
    failed: int = 0  # could not be encoded
    encoding_seconds: float = 0.0
    waiting_seconds: float = 0.0  # for images to be read, decoded and resized

    def to_json(self) -> str:
        return json.dumps({**vars(self), "why": list(self.why.items())})

    @staticmethod
    def from_json(text: str) -> Filled:
        values = json.loads(text)
        return Filled(**{**values, "why": Counter(dict(values["why"]))})

    def add(self, other: Filled) -> None:
        """Take over what another data set, or another process, came to."""
        self.encoded += other.encoded
        self.why += other.why
        self.failed += other.failed
        self.encoding_seconds += other.encoding_seconds
        self.waiting_seconds += other.waiting_seconds

    def describe(self, needed: int, encoder: str) -> str:
        """One line, such as `377 needed, 300 cached; 77 encoded in 41 s (1.9/s, limited by encoding): 70 new, 7 changed image`."""
        line = f"{needed:,} needed, {needed - self.encoded - self.failed:,} cached"
        if not self.encoded:
            return line
        seconds = max(self.encoding_seconds + self.waiting_seconds, 1e-3)
        limit = encoder if self.encoding_seconds >= self.waiting_seconds else "reading and resizing"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.why.most_common())
        return f"{line}; {self.encoded:,} encoded in {seconds:.0f} s ({self.encoded / seconds:,.1f}/s, limited by {limit}): {reasons}"


def gathered(filled: Sequence[Filled], workers: Workers) -> Filled:
    """What filling came to over all data sets of this process, and then over all processes."""
    mine, total = Filled(), Filled()
    for part in filled:
        mine.add(part)
    shares = [Filled.from_json(text) for text in workers.gather(mine.to_json())]
    for share in shares:
        total.add(share)
    total.encoding_seconds = max(share.encoding_seconds for share in shares)  # the processes work at the same time
    total.waiting_seconds = max(share.waiting_seconds for share in shares)
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
def background(ahead: int) -> Iterator[Callable[..., None]]:
    """Gives a function that runs another in a background thread, in order; it waits when more than `ahead` are pending.

    What fails there is raised by a later call or on leaving, after everything that was begun has ended.
    """
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:

        def submit(function: Callable[..., None], *arguments: object) -> None:
            pending.append(pool.submit(function, *arguments))
            while len(pending) > ahead:
                pending.popleft().result()

        try:
            yield submit
        finally:
            while pending:
                pending.popleft().result()


def available_threads() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
