"""Captions to text tensors in a cache: each distinct caption once, however many images share it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from helpers.data.base.padding import without_padding
from helpers.data.cache.cache import Cache, Writer, record_key
from helpers.data.encode.fill import REASONS, WRITES_AHEAD, Filled, FillOptions, background, is_finite, stored
from helpers.errors import DataError, Interrupted

if TYPE_CHECKING:
    from helpers.data.ports import TextEncoders


def text_key(caption: str | None, fingerprint: str, cache_dtype: str) -> bytes:
    """The key of a caption's text tensors; None is the family's unconditional."""
    kind = "unconditional" if caption is None else "text"
    return record_key(kind, caption or "", fingerprint, cache_dtype)


def text_subject(caption: str | None) -> str:
    """The name that the facts of a caption's text tensors are kept under."""
    return "unconditional" if caption is None else f"text {hashlib.sha256(json.dumps(caption).encode()).hexdigest()}"


class TextFiller:
    """Fills a cache with the text tensors of captions; the encoders are used only for captions that are missing."""

    def __init__(self, cache: Cache, encoders: TextEncoders) -> None:
        self.cache = cache
        self.encoders = encoders

    def batches(self, captions: Sequence[str], batch_size: int) -> list[Sequence[str]]:
        """The fixed batches of distinct captions that are in an order of their own, such as sorted."""
        return [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]

    def pending(self, captions: Sequence[str], options: FillOptions) -> list[Sequence[str]]:
        """This process's batches in which a caption is missing."""
        mine = self.batches(captions, options.batch_size)[options.rank :: options.world_size]
        return [batch for batch in mine if self._missing(batch, options)]

    def encode(self, batches: Sequence[Sequence[str]], options: FillOptions) -> Filled:
        """Encode what is missing of the given batches.

        DataError when the encoders' answer is not finite; Interrupted, after sealing what is done, when stopped.
        """
        filled = Filled()
        with Writer(self.cache, options.rank) as writer, background(WRITES_AHEAD) as write:
            for captions in batches:
                started = time.monotonic()
                missing = self._missing(captions, options)
                encoded = self.encoders.encode(captions)
                tensors = {name: stored(tensor, options.cache_dtype).cpu() for name, tensor in encoded.items()}
                filled.encoding_seconds += time.monotonic() - started
                records = [(captions[i], {name: tensor[i] for name, tensor in tensors.items()}) for i in missing]
                write(self._store, writer, records, options, filled)
                options.progress(len(captions))
                if options.should_stop():
                    raise Interrupted("stopped while captions were encoded; what has been encoded is kept, start again to go on")
        return filled

    def keep(self, caption: str | None, tensors: Mapping[str, Tensor], options: FillOptions) -> None:
        """Keep text tensors that have been made already, such as the unconditional (None)."""
        record = {name: stored(tensor, options.cache_dtype).cpu() for name, tensor in tensors.items()}
        with Writer(self.cache, options.rank) as writer:
            self._store(writer, [(caption, record)], options, Filled())

    def _missing(self, captions: Sequence[str], options: FillOptions) -> list[int]:
        """Which of some captions have no record."""
        located = self.cache.find(text_key(caption, self.encoders.fingerprint, options.cache_dtype) for caption in captions)
        return np.flatnonzero(located["shard"] == 0).tolist()

    def _store(self, writer: Writer, records: Sequence[tuple[str | None, dict[str, Tensor]]], options: FillOptions, filled: Filled) -> None:
        facts = {"encoder": self.encoders.fingerprint, "precision": options.cache_dtype}
        for caption, record in records:
            if not is_finite(record):
                raise DataError(
                    f"The text tensors of {(caption or '')[:80]!r} do not fit the cache's precision; use --cache_dtype=bf16 or fp32."
                )
            subject = text_subject(caption)
            filled.why[REASONS[self.cache.changed_fact(subject, facts)]] += 1
            filled.encoded += 1
            writer.add(text_key(caption, self.encoders.fingerprint, options.cache_dtype), without_padding(record), subject, facts)
