"""Images to latents in caches: read, decoded, resized, encoded and written at the same time.

What is encoded at once is a *unit*: some rows of a plan, of one data set and one shape. Units are cut from the plan and always encoded
whole, since the last bits of a record depend on what else was in its batch.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.data.base.images import PIXELS_VERSION, ImageError, cut, decode, require_size
from helpers.data.base.prefetch import read_ahead
from helpers.data.base.sample import Geometry, Sample
from helpers.data.cache.cache import Cache, Writer, record_key
from helpers.data.cache.index import Locations
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.conditions import NAME as CONDITION
from helpers.data.encode.conditions import Condition, Conditions, make, read
from helpers.data.encode.fill import REASONS, WRITES_AHEAD, Filled, FillOptions, background, is_finite, stored
from helpers.data.plan.buckets import BucketPlan
from helpers.errors import DataError, Interrupted, StorageError
from helpers.storage.backend import SourceBackend

if TYPE_CHECKING:
    from helpers.data.ports import ImageCodec

CONTENTS_PER_COMMIT = 256
CONTENTS_SECONDS = 1.0  # no content waits longer for its commit, as long as others follow
IDLE_SECONDS = 0.02
EVERY_EPOCH = -1  # the number of the pass whose latents serve in every epoch; others have the number of their epoch

Rows = NDArray[np.int64]


@dataclass
class Member:
    """One image of a unit on its way through the threads."""

    planned: int  # row in the plan
    row: int  # in the catalogue
    sample: Sample
    geometry: Geometry
    cut: str  # the geometry as part of the key
    content: str = ""  # SHA-256 in hex, once read
    record_key: bytes = b""
    missing: bool = False
    pixels: Tensor | None = None  # (3, H, W); None for a member that cannot be had, or of a batch that lacks nothing
    problem: str = ""
    undecodable: bool = False
    condition: Condition | None = None  # where the data set has them

    @property
    def whole(self) -> str:
        """What `Catalogue.content` will say of the image, once read."""
        return self.content if self.condition is None else f"{self.content} {self.condition.content}"


@dataclass(frozen=True)
class Files:
    """What the images of a data set, and their conditions where it has them, are read from."""

    images: SourceBackend
    conditions: SourceBackend | None = None


class LatentEncoder:
    """Fills the cache of one data set with its images' latents, as one plan cuts them.

    `dataset` is the data set's index in the plan, `number` that of the pass the plan is of. Where the images have `conditions`, a record
    holds both. Nothing is read or loaded on construction; the codec is used only for images that are missing.
    """

    def __init__(
        self,
        plan: BucketPlan,
        dataset: int,
        source: SourceBackend,
        catalogue: Catalogue,
        cache: Cache,
        codec: ImageCodec,
        number: int = EVERY_EPOCH,
        conditions: Conditions | None = None,
    ) -> None:
        self.conditions = conditions
        self.plan = plan
        self.name = plan.datasets[dataset]
        self.rows = np.flatnonzero(plan.columns["dataset"] == dataset)
        self.source = source
        self.catalogue = catalogue
        self.cache = cache
        self.codec = codec
        self.number = number
        self._batch_limit: int | None = None  # images encoded at once; less than the unit once memory did not suffice

    def locate(self, cache_dtype: str) -> Locations:
        """Where the latents of the data set's rows lie, in plan order; field "shard" is 0 where there are none."""
        contents = self.catalogue.contents(self.name)
        planned = cuts(self.plan, self.rows)
        return self.cache.find(self._key(cut, content, cache_dtype) for cut, content in zip(planned, contents, strict=True))

    def batches(self, batch_size: int) -> list[Rows]:
        """The rows of each unit, in plan order."""
        shapes = self.plan.columns["shape"][self.rows]
        by_shape = (self.rows[shapes == shape] for shape in np.unique(shapes))
        return [rows[start : start + batch_size] for rows in by_shape for start in range(0, len(rows), batch_size)]

    def with_codec(self, codec: ImageCodec) -> LatentEncoder:
        """The same with another codec."""
        other = copy.copy(self)
        other.codec = codec
        return other

    def locate_row(self, row: int, cache_dtype: str) -> np.void:
        """Where the latents of one row of the plan lie; field "shard" is 0 where there are none, or nobody has read the image."""
        content = self.catalogue.content(int(self.plan.columns["row"][row]))
        return self.cache.find([self._key(cuts(self.plan, [row])[0], content, cache_dtype)])[0]

    def twins(self, row: int) -> list[int]:
        """Rows of the plan that have the record of a row: the same image under other names, with the same cut. Itself among them."""
        images = list(self.catalogue.with_content_of(int(self.plan.columns["row"][row])))
        rows = self.rows[np.isin(self.plan.columns["row"][self.rows], images)]
        (cut,) = cuts(self.plan, [row])
        return [int(other) for other, other_cut in zip(rows, cuts(self.plan, rows), strict=True) if other_cut == cut]

    def encode_again(self, row: int, options: FillOptions) -> np.void:
        """Replace the latents of one row of the plan. => their new place, field "shard" 0 where the image cannot be had as it was."""
        content = self.catalogue.content(int(self.plan.columns["row"][row]))
        self.cache.discard(self._key(cuts(self.plan, [row])[0], content, options.cache_dtype))
        encode_units([(self, rows) for rows in self.batches(options.batch_size) if row in rows], self.catalogue, options)
        return self.locate_row(row, options.cache_dtype)

    def keys(self, rows: Rows) -> Iterator[str]:
        """The images of some rows of the plan, in the order in which `load` asks for them, each once."""
        return (self.catalogue.sample(int(self.plan.columns["row"][row])).key for row in rows)

    def condition_keys(self, rows: Rows) -> Iterator[str]:
        """Their conditions, likewise."""
        found = (self._condition(int(self.plan.columns["row"][row])) for row in rows)
        return (condition.sample.key for condition in found if condition is not None)

    @property
    def files(self) -> Files:
        return Files(self.source, None if self.conditions is None else self.conditions.source)

    def load(self, rows: Rows, options: FillOptions, sources: Files) -> list[Member]:
        """The members of a unit, read and, where one of them is missing, decoded and cut."""
        members = []
        files = {}
        for row, cut_text in zip(rows, cuts(self.plan, rows), strict=True):
            image = int(self.plan.columns["row"][row])
            sample = self.catalogue.sample(image)
            member = Member(int(row), image, sample, self.plan.geometry(int(row)), cut_text, condition=self._condition(image))
            members.append(member)
            if member.condition is not None and sources.conditions is not None:
                member.problem = read(member.condition, sources.conditions)
            try:
                data = sources.images.read(sample.key)
            except (FileNotFoundError, PermissionError) as error:
                member.problem = f"cannot be opened: {error.strerror or error}"
                continue
            except OSError as error:
                raise StorageError(f"{self.source.name}: {sample.key} could not be read: {error.strerror or error}") from error
            member.content = hashlib.sha256(data).hexdigest()
            if member.problem:  # of its condition
                continue
            member.record_key = self._key(member.cut, member.whole, options.cache_dtype)
            files[member.row] = data
        whole = [member for member in members if member.row in files]
        for member, location in zip(whole, self.cache.find(member.record_key for member in whole), strict=True):
            member.missing = not location["shard"]
        if any(member.missing for member in whole):
            for member in whole:
                _decode(member, files.pop(member.row), self.conditions)
        if not any(member.missing and member.pixels is not None for member in members):
            for member in members:
                member.pixels = None  # nothing to encode
                if member.condition is not None:
                    member.condition.data = member.condition.made = None
        return members

    def _condition(self, image: int) -> Condition | None:
        row = self.catalogue.condition_row(image) if self.conditions is not None else None
        return None if row is None else Condition(row, self.catalogue.sample(row))

    def encoded(self, members: Sequence[Member], options: FillOptions, filled: Filled) -> dict[int, dict[str, Tensor] | None]:
        """A record for each member that has pixels, by its row; None where memory did not suffice even for the image alone."""
        shown = [member for member in members if member.pixels is not None]
        started = time.monotonic()
        limit = self._batch_limit or max(len(shown), 1)
        records: dict[int, dict[str, Tensor] | None] = {}
        while len(records) < len(shown):
            part = shown[len(records) : len(records) + limit]
            encoded = self._encode(part)
            if encoded is not None:
                for i, member in enumerate(part):
                    records[member.row] = {name: stored(tensors[i], options.cache_dtype).cpu() for name, tensors in encoded.items()}
            elif len(part) == 1:
                records[part[0].row] = None
            else:
                limit = self._batch_limit = len(part) // 2
        for member in shown:
            member.pixels = None  # the writer may be some batches behind
            if member.condition is not None:
                member.condition.made = None
        filled.encoding_seconds += time.monotonic() - started
        return records

    def _encode(self, members: Sequence[Member]) -> Mapping[str, Tensor | Sequence[Tensor]] | None:
        """The tensors of some members that have pixels, by name; None where memory does not suffice."""
        encoded = _encode_unless_out_of_memory(self.codec, [member.pixels for member in members if member.pixels is not None])
        conditions = [member.condition.made for member in members if member.condition is not None and member.condition.made is not None]
        if encoded is None or self.conditions is None:
            return encoded
        if not self.conditions.as_latents:
            return {**encoded, CONDITION: conditions}
        latents = _encode_unless_out_of_memory(self.codec, conditions)
        return None if latents is None else {**encoded, CONDITION: latents["mean"]}

    def store(
        self, writer: Writer, members: Sequence[Member], records: dict[int, dict[str, Tensor] | None], options: FillOptions, filled: Filled
    ) -> None:
        """Keep what is missing, and tell the catalogue of what could not be encoded."""
        for member in members:
            if member.missing and member.row in records:
                record = records[member.row]
                if record is None:
                    member.problem = "out of memory: the image alone does not fit while it is encoded"
                elif not is_finite(record):
                    member.problem = (
                        "not finite: the VAE's answer does not fit the cache's precision; use --vae_dtype=fp32 and --cache_dtype=fp32"
                    )
                else:
                    self._keep(writer, member, record, options, filled)
            if member.problem:
                filled.failed += 1
                self.catalogue.add_failure(self.number, member.row, member.problem, member.undecodable)

    def _keep(self, writer: Writer, member: Member, record: dict[str, Tensor], options: FillOptions, filled: Filled) -> None:
        subject = latents_subject(member.sample)
        facts = latents_facts(member.whole, member.cut, self.codec.fingerprint, options.cache_dtype, self.conditions)
        filled.why[REASONS[self.cache.changed_fact(subject, facts)]] += 1
        filled.encoded += 1
        writer.add(member.record_key, record, subject, facts)

    def _key(self, cut: str, content: str | None, cache_dtype: str) -> bytes:
        """The key of an image's latents; of an image that nobody has read yet, a key that no record has."""
        if content is None:
            return b""
        return latents_key(latents_facts(content, cut, self.codec.fingerprint, cache_dtype, self.conditions))


def latents_subject(sample: Sample) -> str:
    """The name that the facts of an image's latents are kept under."""
    return f"{sample.dataset}/{sample.key}"


def latents_facts(content: str, cut: str, encoder: str, cache_dtype: str, conditions: Conditions | None = None) -> dict[str, str]:
    """All that an image's record depends on: its content, its cut, the codec's fingerprint, the cache's precision.

    Content is what `Catalogue.content` says; `conditions` are those that the data set's images have.
    """
    facts = {"image": content, "encoder": encoder, "geometry": cut, "precision": cache_dtype}
    return facts if conditions is None else {**facts, "condition": conditions.fact}


def latents_key(facts: Mapping[str, str]) -> bytes:
    """The key of the record that was made of these."""
    condition = [facts["condition"]] if "condition" in facts else []
    return record_key("latents", facts["image"], facts["geometry"], facts["encoder"], facts["precision"], *condition)


Unit = tuple[LatentEncoder, Rows]


def encode_units(
    units: Iterable[Unit | None],
    catalogue: Catalogue,
    options: FillOptions,
    stored: Callable[[LatentEncoder, Sequence[Member], Writer], None] = lambda filler, members, writer: None,
) -> Filled:
    """Encode what is missing of some units. Images that cannot be had are told to the catalogue (`Catalogue.failures`).

    Reading, decoding and resizing, encoding, and writing overlap. A unit of None says that there is none at present: what has been
    encoded is sealed, and after a moment the next one is asked for. `stored` is called in the writer's thread after each unit.
    Interrupted, after sealing what is done, when stopped.
    """
    filled = Filled()

    def store(filler: LatentEncoder, members: Sequence[Member], records: dict[int, dict[str, Tensor] | None]) -> None:
        writer = writers.of(filler.cache)
        filler.store(writer, members, records, options, filled)
        stored(filler, members, writer)

    with (
        _read_ahead(units) as files,
        Writers(options) as writers,
        background(WRITES_AHEAD) as write,
        _Contents(catalogue) as contents,
    ):
        for loaded in _loaded(units, files, options, filled):
            if loaded is None:
                contents.flush()
                write(writers.seal)
                time.sleep(IDLE_SECONDS)
            else:
                filler, members = loaded
                contents.add(members)
                write(store, filler, members, filler.encoded(members, options, filled))
                options.progress(len(members))
            if options.should_stop():
                raise Interrupted("stopped while images were encoded; what has been encoded is kept, start again to go on")
    return filled


@contextmanager
def _read_ahead(units: Iterable[Unit | None]) -> Iterator[dict[str, Files]]:
    """What to read the files of each data set from. Remote ones are read ahead where it is known what will be asked for."""
    files: dict[str, Files] = {}
    with ExitStack() as stack:
        if isinstance(units, Sequence):
            by_dataset: dict[str, list[Unit]] = {}
            for unit in units:
                if unit is not None:
                    by_dataset.setdefault(unit[0].name, []).append(unit)
            for dataset, own in by_dataset.items():
                files[dataset] = _files_ahead(own, stack)
        yield files


def _files_ahead(units: Sequence[Unit], stack: ExitStack) -> Files:
    """The files of one data set."""
    files = units[0][0].files
    images = stack.enter_context(read_ahead(files.images, (key for filler, rows in units for key in filler.keys(rows))))
    if files.conditions is None:
        return Files(images)
    keys = (key for filler, rows in units for key in filler.condition_keys(rows))
    return Files(images, stack.enter_context(read_ahead(files.conditions, keys)))


def _loaded(
    units: Iterable[Unit | None], files: Mapping[str, Files], options: FillOptions, filled: Filled
) -> Iterator[tuple[LatentEncoder, list[Member]] | None]:
    """The units in order with their members, read, decoded and cut by threads a few units ahead; None where there is none."""
    pool = ThreadPoolExecutor(options.threads, thread_name_prefix="images")
    waiting: deque[tuple[LatentEncoder, Future[list[Member]]]] = deque()
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
                filler, rows = unit
                waiting.append((filler, pool.submit(filler.load, rows, options, files.get(filler.name, filler.files))))
            if not waiting:
                if more:
                    yield None
                continue
            started = time.monotonic()
            filler, future = waiting.popleft()
            members = future.result()
            filled.waiting_seconds += time.monotonic() - started
            yield filler, members
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_without_images(filler: LatentEncoder, failed: Mapping[int, str]) -> None:
    """DataError where every image of a data set is among those that failed (catalogue row => reason)."""
    images = filler.plan.columns["row"][filler.rows].tolist()
    if all(image in failed for image in images):
        raise DataError(
            f"data set {filler.name!r}: none of its {len(images):,} images in {filler.source.name} could be encoded;"
            f" {filler.catalogue.sample(images[0]).key}: {failed[images[0]]}."
        )


class Writers:
    """A writer for each cache, begun when it is first needed; leaving the `with` block seals all of them, as a `Writer` does.

    Those of caches that are given up are let go, with what they have not sealed.
    """

    def __init__(self, options: FillOptions) -> None:
        self._options = options
        self._writers: dict[int, Writer] = {}

    def of(self, cache: Cache) -> Writer:
        if id(cache) not in self._writers:
            self._let_go()
            self._writers[id(cache)] = Writer(cache, self._options.rank, self._options.seal_after)
        return self._writers[id(cache)]

    def seal(self) -> None:
        self._let_go()
        for writer in self._writers.values():
            writer.seal()

    def _let_go(self) -> None:
        self._writers = {key: writer for key, writer in self._writers.items() if not writer.cache.given_up}

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)


class _Contents:
    """Tells the catalogue what images' bytes are, many in one transaction."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._pending: list[tuple[int, str]] = []
        self._flushed = time.monotonic()

    def add(self, members: Sequence[Member]) -> None:
        self._pending += [(member.row, member.content) for member in members if member.content]
        self._pending += [(other.row, other.content) for member in members if (other := member.condition) is not None and other.content]
        if len(self._pending) >= CONTENTS_PER_COMMIT or time.monotonic() - self._flushed > CONTENTS_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._catalogue.set_content(self._pending)
        self._pending = []
        self._flushed = time.monotonic()

    def __enter__(self) -> _Contents:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()


def _decode(member: Member, data: bytes, conditions: Conditions | None) -> None:
    try:
        # Before decoding: a JPEG may be decoded at half its size, which then looks like that of an image half as large.
        require_size(data, member.geometry.original)
        member.pixels = cut(decode(data, member.geometry.resized), member.geometry)
    except ImageError as error:
        member.problem = str(error)
        member.undecodable = True
    if member.pixels is None or member.condition is None or conditions is None:
        return
    try:
        make(member.condition, conditions, member.geometry)
    except ImageError as error:
        member.pixels = None
        member.problem = f"condition {error}"
        member.undecodable = True


def _encode_unless_out_of_memory(codec: ImageCodec, pixels: Sequence[Tensor]) -> dict[str, Tensor] | None:
    try:
        return codec.encode(torch.stack(list(pixels)))
    except torch.OutOfMemoryError:
        pass  # outside the handler, or the exception would keep the failed attempt's tensors alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def cuts(plan: BucketPlan, rows: Rows | Sequence[int]) -> list[str]:
    """Everything about the cut of each row that its pixels depend on. From the columns: a plan may have millions of rows."""
    columns = plan.columns[rows]
    names = ("resized_width", "resized_height", "top", "left", "shape", "flip")
    return [
        f"{width}x{height} {top},{left} {plan.shapes[shape]}{' flip' if flip else ''} v{PIXELS_VERSION}"
        for width, height, top, left, shape, flip in zip(*(columns[name].tolist() for name in names), strict=True)
    ]
