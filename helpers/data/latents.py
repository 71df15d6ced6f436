"""Images to latents in a cache: each once, read, decoded, resized, encoded and written at the same time."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.data.buckets import BucketPlan
from helpers.data.cache import Cache, Locations, Writer, record_key
from helpers.data.catalogue import Catalogue
from helpers.data.fill import REASONS, WRITES_AHEAD, Filled, FillOptions, background, is_finite, stored
from helpers.data.images import ImageError, cut, decode
from helpers.data.sample import Geometry, Sample
from helpers.errors import Interrupted, StorageError
from helpers.storage.backend import SourceBackend

if TYPE_CHECKING:
    from helpers.protocols import ImageCodec

PIXELS_VERSION = 1  # to be raised by whoever changes the pixels that `images.decode` and `images.cut` give
CONTENTS_PER_COMMIT = 256

Rows = NDArray[np.int64]


@dataclass
class _Member:
    """One image of a batch on its way through the threads."""

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


class LatentFiller:
    """Fills the cache of one data set with its images' latents.

    `dataset` is the data set's index in the plan. Nothing is read or loaded on construction; the codec is used only for images
    that are missing.
    """

    def __init__(
        self, plan: BucketPlan, dataset: int, source: SourceBackend, catalogue: Catalogue, cache: Cache, codec: ImageCodec
    ) -> None:
        self.plan = plan
        self.name = plan.datasets[dataset]
        self.rows = np.flatnonzero(plan.columns["dataset"] == dataset)
        self.source = source
        self.catalogue = catalogue
        self.cache = cache
        self.codec = codec
        self._batch_limit = 0  # images encoded at once; less than the batch once memory did not suffice

    def locate(self, cache_dtype: str) -> Locations:
        """Where the latents of the data set's rows lie, in plan order; field "shard" is 0 where there are none."""
        contents = self.catalogue.contents(self.name)
        planned = cuts(self.plan, self.rows)
        return self.cache.find(self._key(cut, content, cache_dtype) for cut, content in zip(planned, contents, strict=True))

    def batches(self, batch_size: int) -> list[Rows]:
        """The fixed batches: rows of the plan, of one shape each, in plan order."""
        shapes = self.plan.columns["shape"][self.rows]
        by_shape = (self.rows[shapes == shape] for shape in np.unique(shapes))
        return [rows[start : start + batch_size] for rows in by_shape for start in range(0, len(rows), batch_size)]

    def pending(self, locations: Locations, options: FillOptions) -> list[Rows]:
        """This process's batches in which a member is missing; `locations` are those of all rows of the plan."""
        mine = self.batches(options.batch_size)[options.rank :: options.world_size]
        return [rows for rows in mine if not locations["shard"][rows].all()]

    def encode(self, batches: Sequence[Rows], options: FillOptions) -> Filled:
        """Encode what is missing of the given batches. Images that cannot be had are told in `Filled.failed`.

        Reading, decoding and resizing, encoding, and writing overlap. Interrupted, after sealing what is done, when stopped.
        """
        filled = Filled()
        self._batch_limit = options.batch_size
        contents = _Contents(self.catalogue)
        with Writer(self.cache, options.rank) as writer, background(WRITES_AHEAD) as write, contents:
            for members in self._loaded(batches, options, filled):
                contents.add(members)
                records = self._encoded(members, options, filled)
                write(self._store, writer, members, records, options, filled)
                options.progress(len(members))
        return filled

    def encode_again(self, row: int, options: FillOptions) -> np.void:
        """Replace the latents of one row of the plan. => their new place, field "shard" 0 where the image cannot be had as it was."""
        content = self.catalogue.content(int(self.plan.columns["row"][row]))
        key = self._key(cuts(self.plan, [row])[0], content, options.cache_dtype)
        self.cache.discard(key)
        self.encode([batch for batch in self.batches(options.batch_size) if row in batch], options)
        return self.cache.find([key])[0]

    def _loaded(self, batches: Sequence[Rows], options: FillOptions, filled: Filled) -> Iterator[list[_Member]]:
        """The members of each batch in order, read, decoded and cut by threads a few batches ahead."""
        pool = ThreadPoolExecutor(options.threads, thread_name_prefix="images")
        waiting: deque[Future[list[_Member]]] = deque()
        try:
            ahead = iter(batches)
            while True:
                while len(waiting) <= options.threads and (rows := next(ahead, None)) is not None:
                    waiting.append(pool.submit(self._load, rows, options))
                if not waiting:
                    return
                started = time.monotonic()
                members = waiting.popleft().result()
                filled.waiting_seconds += time.monotonic() - started
                yield members
                if options.should_stop():
                    raise Interrupted("stopped while images were encoded; what has been encoded is kept, start again to go on")
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, rows: Rows, options: FillOptions) -> list[_Member]:
        members = []
        files = {}
        for row, cut_text in zip(rows, cuts(self.plan, rows), strict=True):
            image = int(self.plan.columns["row"][row])
            sample = self.catalogue.sample(image)
            member = _Member(image, sample, self.plan.geometry(int(row)), cut_text)
            members.append(member)
            try:
                data = self.source.read(sample.key)
            except (FileNotFoundError, PermissionError) as error:
                member.problem = f"cannot be opened: {error.strerror or error}"
                continue
            except OSError as error:
                raise StorageError(f"{self.source.name}: {sample.key} could not be read: {error.strerror or error}") from error
            member.content = hashlib.sha256(data).hexdigest()
            member.record_key = self._key(member.cut, member.content, options.cache_dtype)
            files[member.row] = data
        read = [member for member in members if member.content]
        for member, location in zip(read, self.cache.find(member.record_key for member in read), strict=True):
            member.missing = not location["shard"]
        if any(member.missing for member in read):
            for member in read:
                _decode(member, files.pop(member.row))
        if not any(member.missing and member.pixels is not None for member in members):
            for member in members:
                member.pixels = None  # nothing to encode
        return members

    def _encoded(self, members: Sequence[_Member], options: FillOptions, filled: Filled) -> dict[int, dict[str, Tensor] | None]:
        """A record for each member that has pixels, by its row; None where memory did not suffice even for the image alone."""
        shown = [member for member in members if member.pixels is not None]
        started = time.monotonic()
        records: dict[int, dict[str, Tensor] | None] = {}
        while len(records) < len(shown):
            part = shown[len(records) : len(records) + self._batch_limit]
            encoded = _encode_unless_out_of_memory(self.codec, [member.pixels for member in part if member.pixels is not None])
            if encoded is not None:
                tensors = {name: stored(tensor, options.cache_dtype).cpu() for name, tensor in encoded.items()}
                records |= {member.row: {name: tensor[i] for name, tensor in tensors.items()} for i, member in enumerate(part)}
            elif len(part) == 1:
                records[part[0].row] = None
            else:
                self._batch_limit = len(part) // 2
        for member in shown:
            member.pixels = None  # the writer may be some batches behind
        filled.encoding_seconds += time.monotonic() - started
        return records

    def _store(
        self, writer: Writer, members: Sequence[_Member], records: dict[int, dict[str, Tensor] | None], options: FillOptions, filled: Filled
    ) -> None:
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
                filled.failed[member.row] = member.problem
            if member.undecodable:
                filled.undecodable.add(member.row)

    def _keep(self, writer: Writer, member: _Member, record: dict[str, Tensor], options: FillOptions, filled: Filled) -> None:
        subject = latents_subject(member.sample)
        facts = latents_facts(member.content, member.cut, self.codec.fingerprint, options.cache_dtype)
        filled.why[REASONS[self.cache.changed_fact(subject, facts)]] += 1
        filled.encoded += 1
        writer.add(member.record_key, record, subject, facts)

    def _key(self, cut: str, content: str | None, cache_dtype: str) -> bytes:
        """The key of an image's latents; of an image that nobody has read yet, a key that no record has."""
        if content is None:
            return b""
        return latents_key(latents_facts(content, cut, self.codec.fingerprint, cache_dtype))


def latents_subject(sample: Sample) -> str:
    """The name that the facts of an image's latents are kept under."""
    return f"{sample.dataset}/{sample.key}"


def latents_facts(content: str, cut: str, encoder: str, cache_dtype: str) -> dict[str, str]:
    """All that an image's latents depend on: SHA-256 of its bytes, its cut, the codec's fingerprint, the cache's precision."""
    return {"image": content, "encoder": encoder, "geometry": cut, "precision": cache_dtype}


def latents_key(facts: Mapping[str, str]) -> bytes:
    """The key of the latents that were made of these."""
    return record_key("latents", facts["image"], facts["geometry"], facts["encoder"], facts["precision"])


class _Contents:
    """Tells the catalogue what images' bytes are, many in one transaction."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._pending: list[tuple[int, str]] = []

    def add(self, members: Sequence[_Member]) -> None:
        self._pending += [(member.row, member.content) for member in members if member.content]
        if len(self._pending) >= CONTENTS_PER_COMMIT:
            self._flush()

    def __enter__(self) -> _Contents:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._catalogue.set_content(self._pending)
        self._pending = []


def _decode(member: _Member, data: bytes) -> None:
    try:
        member.pixels = cut(decode(data, member.geometry.resized), member.geometry)
    except ImageError as error:
        member.problem = str(error)
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
