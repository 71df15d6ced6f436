"""Captions to text tensors in caches, each distinct caption once, and text tensors to whoever asks for a caption."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from helpers.data.base.padding import without_padding
from helpers.data.base.progress import bar
from helpers.data.base.workers import Workers
from helpers.data.cache.cache import Cache, DamagedRecordError, Writer
from helpers.data.encode.common import EncodeOptions, EncodeTotals, background_writes, is_finite, stored, totals_of_all
from helpers.data.encode.keys import text_key, text_subject
from helpers.data.planned import PlannedData
from helpers.data.report.dataset_report import cut_off_line
from helpers.data.settings import DataContext
from helpers.data.sources import extra_texts_place, open_caches, texts_place
from helpers.errors import DataError, Interrupted
from helpers.storage.memo import digest_of

if TYPE_CHECKING:
    from helpers.data.ports import TextEncoders

EXTRA = -1  # stands for the index of a dataset: captions of no dataset, such as validation prompts, and the unconditional

log = logging.getLogger(__name__)


class CaptionEncoder:
    """Encodes captions into one cache, in batches that do not depend on what is missing, and counts them in `totals`.

    The encoders are used for missing captions only.
    """

    def __init__(self, cache: Cache, encoders: TextEncoders, options: EncodeOptions) -> None:
        self.totals = EncodeTotals()
        self._cache = cache
        self._encoders = encoders
        self._options = options

    def batches(self, captions: Sequence[str]) -> list[Sequence[str]]:
        """The batches of distinct captions, whose order must always be the same, such as sorted."""
        size = self._options.batch_size
        return [captions[start : start + size] for start in range(0, len(captions), size)]

    def pending(self, captions: Sequence[str]) -> list[Sequence[str]]:
        """This process's batches in which a caption is missing."""
        workers = self._options.workers
        return [batch for batch in self.batches(captions)[workers.rank :: workers.world_size] if self._missing(batch)]

    def encode(self, batches: Sequence[Sequence[str]]) -> None:
        """Encode what is missing of some batches.

        Raises DataError when the encoders return values that are not finite, and Interrupted, after sealing what is done, when stopped.
        """
        with Writer(self._cache, self._options.workers.rank) as writer, background_writes() as write:
            for captions in batches:
                started = time.monotonic()
                missing = self._missing(captions)
                tensors = self._stored(self._encoders.encode(captions))
                self.totals.encoding_seconds += time.monotonic() - started
                write(self._store, writer, [(captions[i], {name: tensor[i] for name, tensor in tensors.items()}) for i in missing])
                self._options.progress(len(captions))
                if self._options.workers.should_stop():
                    raise Interrupted("stopped while captions were encoded; encoded captions are kept, start again to continue")

    def store(self, caption: str | None, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors that were encoded elsewhere, such as the unconditional (None)."""
        with Writer(self._cache, self._options.workers.rank) as writer:
            self._store(writer, [(caption, self._stored(tensors))])

    def _missing(self, captions: Sequence[str]) -> list[int]:
        """Positions of the captions that have no record."""
        located = self._cache.find(map(self._key, captions))
        return np.flatnonzero(located["shard"] == 0).tolist()

    def _stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: stored(tensor, self._options.cache_dtype).cpu() for name, tensor in tensors.items()}

    def _store(self, writer: Writer, records: Sequence[tuple[str | None, dict[str, Tensor]]]) -> None:
        facts = {"encoder": self._encoders.fingerprint, "precision": self._options.cache_dtype}
        for caption, record in records:
            if not is_finite(record):
                raise DataError(
                    f"The text tensors of {(caption or '')[:80]!r} do not fit the cache's precision; use --cache_dtype=bf16 or fp32."
                )
            subject = text_subject(caption)
            self.totals.count(self._cache.changed_fact(subject, facts))
            writer.add(self._key(caption), without_padding(record), subject, facts)

    def _key(self, caption: str | None) -> bytes:
        return text_key(caption, self._encoders.fingerprint, self._options.cache_dtype)


class TextStore:
    """The text tensors of a run: those of its captions, of the prompts it needs besides, and the unconditional.

    First `encode`; then `read` from any thread. Where the text encoders are trained, nothing is cached and nothing can be read.
    """

    def __init__(self, data: PlannedData, context: DataContext) -> None:
        self.is_cached = not context.settings.live_text
        self.fingerprint = ""  # of the text encoders, once `encode` was called
        self.unconditional: dict[str, Tensor] = {}  # what a dropped caption becomes; likewise, and empty where encoders are trained
        self._data = data
        self._family = context.family
        self._settings = context.settings
        self._workers = context.workers
        self._report = context.report
        self._memo = context.memo
        self._options = context.encode_options(context.settings.text_batch_size)
        self._extra = sorted({"", *context.settings.extra_captions})
        self._caches: list[Cache] = []  # of each dataset, and last of the extra captions
        self._repairing = threading.Lock()

    @property
    def is_remote(self) -> bool:
        """Whether text tensors are read from a network."""
        return any(cache.remote for cache in self._caches)

    # -- encoding ---------------------------------------------------------------------------------------------------------

    def encode(self) -> None:
        """Encode every caption that is not cached. Raises DataError, StorageError, and Interrupted when stopped."""
        if not self.is_cached:
            self._report_live_text()
            return
        datasets, settings, memo = self._data.datasets, self._settings, self._memo
        places = [texts_place(dataset, settings.cache_dir) for dataset in datasets]
        places.append(extra_texts_place(datasets, settings.text_cache_dir, settings.cache_dir))
        with self._family.text_encoders(settings.device) as encoders:
            with self._workers.phase():
                self.fingerprint = encoders.fingerprint
                self._caches = open_caches(places, self._report)
                marks = [cache.revision() for cache in self._caches]
                inputs = digest_of(self._data.digest(), encoders.fingerprint, settings.cache_dtype, marks)
                cached = memo.load_value("captions", inputs)  # number of captions of the datasets, if all are known to be cached
                wanted = [self._captions(index) if cached is None else [] for index in range(len(datasets))]
                wanted.append(self._extra)
                mine = [self._encode(*each, encoders) for each in zip(self._caches, wanted, strict=True)]
                self._encode_unconditional(encoders)
            truncated = sum(map(int, self._workers.gather(str(encoders.truncated))))
        if cached is None:
            cached = sum(map(len, wanted[:-1]))
            if self._workers.is_first:
                memo.save_value("captions", inputs, cached)
        totals = totals_of_all(mine, self._workers)
        self._report.chapter("text", totals.describe(cached + len(self._extra), "the text encoders"))
        self._report_truncated(truncated)
        self.unconditional = self.read(None)

    def _encode(self, cache: Cache, captions: Sequence[str], encoders: TextEncoders) -> EncodeTotals:
        encoder = CaptionEncoder(cache, encoders, self._options)
        if pending := encoder.pending(captions):
            with bar(self._report, "encode captions", sum(map(len, pending)), "captions") as progress:
                encoder = CaptionEncoder(cache, encoders, dataclasses.replace(self._options, progress=progress))
                encoder.encode(pending)
        return encoder.totals

    def _encode_unconditional(self, encoders: TextEncoders) -> None:
        cache = self._caches[EXTRA]
        if self._workers.is_first and not cache.find([self._key(None)])["shard"][0]:
            CaptionEncoder(cache, encoders, self._options).store(None, self._family.unconditional(encoders))

    def _report_live_text(self) -> None:
        """Say that captions are encoded in every step, and how many are too long."""
        with self._family.text_encoders(self._settings.device) as encoders:
            self.fingerprint = f"trained from {encoders.fingerprint}"
        entries = sorted({dataset.text_entry.id for dataset in self._data.datasets if dataset.text_entry is not None})
        unused = f"; text_embeds {', '.join(entries)} is not used" if entries else ""
        self._report.chapter("text", f"the text encoders are trained: captions are encoded in every step, and none is cached{unused}")
        lengths = self._family.caption_lengths()
        limit = lengths.limit
        if limit is None or not self._workers.is_first:
            return

        def count() -> int:
            captions = {caption for index in range(len(self._data.datasets)) for caption in self._captions(index)}
            return sum(length > limit for length in lengths.token_counts(sorted(captions)))

        self._report_truncated(self._memo.recall("truncated", digest_of(self._data.digest(), lengths.fingerprint), count))

    def _report_truncated(self, count: int) -> None:
        if count:
            self._report.chapter("", cut_off_line(count))

    # -- reading ----------------------------------------------------------------------------------------------------------

    def read(self, caption: str | None, dataset: int = EXTRA) -> dict[str, Tensor]:
        """The text tensors of a caption of a dataset (by its index), or of an extra caption; None is the unconditional.

        A damaged record is encoded again. Raises DataError for a caption that `encode` did not encode.
        """
        cache, key = self._caches[dataset], self._key(caption)
        try:
            record = cache.get(key)
            if record is not None:
                if not is_finite(record):
                    raise DamagedRecordError(f"{cache.folder}: a record holds values that are not finite")
                return record
        except DamagedRecordError as error:
            log.warning("%s, that of the caption %r; it is encoded again.", error, (caption or "")[:80])
            cache.discard(key)
        self._repair(caption, dataset)
        record = cache.get(key)
        if record is None:
            raise DataError(
                f"The text tensors of the caption {(caption or '')[:80]!r} are not in {cache.folder}; start again to encode them."
            )
        return record

    def _repair(self, caption: str | None, dataset: int) -> None:
        """Encode a caption again in the batch it was encoded in. One thread at a time loads the text encoders."""
        options = dataclasses.replace(self._options, workers=Workers(self._workers.rank))  # which nobody stops
        with self._repairing, self._family.text_encoders(self._settings.device) as encoders:
            encoder = CaptionEncoder(self._caches[dataset], encoders, options)
            if caption is None:
                encoder.store(None, self._family.unconditional(encoders))
            else:
                encoder.encode([batch for batch in encoder.batches(self._captions(dataset)) if caption in batch])

    def _captions(self, dataset: int) -> list[str]:
        """The distinct captions of a dataset, sorted."""
        return self._extra if dataset == EXTRA else list(self._data.catalogue.captions(self._data.datasets[dataset].id))

    def _key(self, caption: str | None) -> bytes:
        return text_key(caption, self.fingerprint, self._settings.cache_dtype)
