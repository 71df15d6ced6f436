"""Units of images to records in caches: reading, decoding, encoding and writing at the same time."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType

from torch import Tensor

from helpers.data.base.prefetch import read_ahead
from helpers.data.base.sample import Sample
from helpers.data.cache.cache import Cache, Writer
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.codec import SharedCodec
from helpers.data.encode.common import EncodeOptions, EncodeTotals, background_writes, is_finite, stored
from helpers.data.encode.companions import IMAGE
from helpers.data.encode.items import EncodeItem, Sources, load
from helpers.data.encode.keys import latents_subject
from helpers.data.encode.store import Unit
from helpers.errors import Interrupted
from helpers.storage.backend import SourceBackend

IDLE_SECONDS = 0.02

OUT_OF_MEMORY = "out of memory: the image alone does not fit while it is encoded"
NOT_FINITE = "not finite: the VAE's output does not fit the cache's precision; use --vae_dtype=fp32 and --cache_dtype=fp32"


def encode_units(units: Iterable[Unit | None], codec: SharedCodec, writer: RecordWriter, options: EncodeOptions) -> EncodeTotals:
    """Encode what is missing of some units.

    A unit of None means that there is none at present: what has been encoded is sealed, and after a moment the next unit is asked for.
    Images that cannot be encoded are recorded in the catalogue (`Catalogue.failures`). Raises Interrupted, after sealing what has been
    encoded, when stopped.
    """
    totals = EncodeTotals()
    with codec.held(), _sources_ahead(units) as sources, writer, background_writes() as write:
        for loaded in _loaded(units, sources, options, totals):
            if loaded is None:
                write(writer.flush)
                time.sleep(IDLE_SECONDS)
            else:
                unit, items = loaded
                started = time.monotonic()
                _encode(items, codec, options.cache_dtype)
                totals.encoding_seconds += time.monotonic() - started
                write(writer.keep, unit, items, totals)
                options.progress(len(items))
            if options.workers.should_stop():
                raise Interrupted("stopped while images were encoded; encoded images are kept, start again to continue")
    return totals


class RecordWriter:
    """Writes encoded units into their caches, and what became of their images into the catalogue.

    There is one `Writer` for each cache, made when it is first needed. Leaving the `with` block seals all of them. `wrote` is notified
    after each unit.
    """

    def __init__(self, catalogue: Catalogue, options: EncodeOptions) -> None:
        self.wrote = threading.Condition()
        self._catalogue = catalogue
        self._options = options
        self._writers: dict[int, Writer] = {}
        # Records that may not be sealed yet: (number of the epoch, row of the plan) => writer, key, and how many shards it had sealed.
        self._unsealed: dict[tuple[int, int], tuple[Writer, bytes, int]] = {}

    def writer(self, cache: Cache) -> Writer:
        if id(cache) not in self._writers:
            self._drop_given_up()
            self._writers[id(cache)] = Writer(cache, self._options.workers.rank, self._options.seal_after)
        return self._writers[id(cache)]

    def keep(self, unit: Unit, items: Sequence[EncodeItem], totals: EncodeTotals) -> None:
        """Write the missing records of a unit, and record the content hashes and the failures of its images."""
        if contents := [content for item in items for content in item.contents]:
            self._catalogue.set_content(contents)
        self._unsealed = {place: opened for place, opened in self._unsealed.items() if _may_be_open(*opened)}
        for item in items:
            if item.is_missing and item.record is not None:
                if is_finite(item.record):
                    self._add(unit, item, item.record, totals)
                else:
                    item.problem = NOT_FINITE
            item.record = None
            if item.problem:
                totals.failed += 1
                self._catalogue.add_failure(unit.latents.number, item.image.row, item.problem, item.is_undecodable)
        with self.wrote:
            self.wrote.notify_all()

    def unsealed(self, number: int, row: int) -> dict[str, Tensor] | None:
        """The record of a row of the plan that was written but not sealed yet, if there is one. For any thread."""
        found = self._unsealed.get((number, row))
        return None if found is None else found[0].get(found[1])

    def flush(self) -> None:
        """Seal everything."""
        self._drop_given_up()
        for writer in self._writers.values():
            writer.seal()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)

    def _add(self, unit: Unit, item: EncodeItem, record: dict[str, Tensor], totals: EncodeTotals) -> None:
        subject, writer = latents_subject(item.image.sample), self.writer(unit.cache)
        totals.count(unit.cache.changed_fact(subject, item.facts))
        writer.add(item.key, record, subject, item.facts)
        self._unsealed[unit.latents.number, item.planned] = (writer, item.key, writer.sealed)

    def _drop_given_up(self) -> None:
        self._writers = {key: writer for key, writer in self._writers.items() if not writer.cache.given_up}


def _may_be_open(writer: Writer, key: bytes, sealed: int) -> bool:
    return writer.sealed == sealed and not writer.cache.given_up


def _encode(items: Sequence[EncodeItem], codec: SharedCodec, cache_dtype: str) -> None:
    """Give each item that is ready its record, in smaller batches if memory does not suffice for one."""
    left = [item for item in items if item.is_ready]
    while left:
        shape = left[0].geometry.target
        part = left[: codec.most_at_once.get(shape, len(left))]
        tensors = _tensors(part, codec)
        if tensors is None and len(part) > 1:
            codec.most_at_once[shape] = len(part) // 2
            continue
        for i, item in enumerate(part):
            if tensors is not None:
                item.record = {name: stored(of_all[i], cache_dtype).cpu() for name, of_all in tensors.items()}
            elif item.is_missing:
                item.problem = OUT_OF_MEMORY
        left = left[len(part) :]
    for item in items:
        item.free()  # the writer may be some batches behind


def _tensors(items: Sequence[EncodeItem], codec: SharedCodec) -> dict[str, Sequence[Tensor] | Tensor] | None:
    """What the records of some items hold, by name; None if memory does not suffice."""
    tensors: dict[str, Sequence[Tensor] | Tensor] = {}
    for i, file in enumerate(items[0].files):
        of_all = [tensor for item in items if (tensor := item.files[i].tensor) is not None]
        if not file.kind.as_latents:
            tensors[file.kind.role] = of_all
            continue
        encoded = codec.encode(of_all)
        if encoded is None:
            return None
        tensors |= encoded if file.kind.role == IMAGE else {file.kind.role: encoded["mean"]}
    return tensors


@contextmanager
def _sources_ahead(units: Iterable[Unit | None]) -> Iterator[Mapping[int, Sources]]:
    """What each dataset (by its index) reads from: remote sources read ahead, if it is known which units will be asked for."""
    by_dataset: dict[int, list[Unit]] = {}
    for unit in units if isinstance(units, Sequence) else ():
        by_dataset.setdefault(unit.dataset, []).append(unit)
    with ExitStack() as stack:
        yield {dataset: dict(_ahead(own, stack)) for dataset, own in by_dataset.items()}


def _ahead(units: Sequence[Unit], stack: ExitStack) -> Iterator[tuple[str, SourceBackend]]:
    """By their ids, the sources that units of one dataset are read from: its own, and those of its companions."""
    data, dataset = units[0].latents.data, units[0].dataset

    def keys(of: Callable[[int], Sample | None]) -> Iterator[str]:
        """The files in the order in which `load` reads them."""
        for unit in units:
            for row in unit.latents.plan.columns["row"][unit.rows].tolist():
                if (sample := of(row)) is not None:
                    yield sample.key

    images = data.datasets[dataset].id
    yield images, stack.enter_context(read_ahead(data.sources[images], keys(data.catalogue.sample)))
    for kind in data.companions[dataset]:
        if not kind.is_alpha:
            companions = functools.partial(data.catalogue.companion, role=kind.role)
            yield kind.dataset, stack.enter_context(read_ahead(data.sources[kind.dataset], keys(companions)))


def _loaded(
    units: Iterable[Unit | None], sources: Mapping[int, Sources], options: EncodeOptions, totals: EncodeTotals
) -> Iterator[tuple[Unit, list[EncodeItem]] | None]:
    """The units in order with their images, loaded by threads a few units ahead; None where there is no unit at present."""
    pool = ThreadPoolExecutor(options.threads, thread_name_prefix="images")
    waiting: deque[tuple[Unit, Future[list[EncodeItem]]]] = deque()
    ahead = iter(units)
    more = True
    try:
        while more or waiting:
            while more and len(waiting) <= options.threads:
                try:
                    unit = next(ahead)
                except StopIteration:
                    more = False
                    break
                if unit is None:
                    break
                waiting.append((unit, pool.submit(load, unit, sources.get(unit.dataset, unit.latents.data.sources))))
            if not waiting:
                if more:
                    yield None
                continue
            started = time.monotonic()
            unit, future = waiting.popleft()
            items = future.result()
            totals.waiting_seconds += time.monotonic() - started
            yield unit, items
    finally:
        pool.shutdown(cancel_futures=True)
