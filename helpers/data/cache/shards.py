"""A shard: a safetensors file that holds many records. A record is a few named tensors under one key, with a checksum.

A tensor is called `<key in hex>/<name>`, as in `0f3a.../mean`. The bytes of a record are contiguous, and `crc32` in the metadata holds
their CRC-32. Any program that opens safetensors can read a shard, and the shards are enough to rebuild a lost index.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from helpers.errors import StorageError
from helpers.foreign_json import parse_json
from helpers.storage.atomic import sync_folder

SUFFIX = ".safetensors"
UNSEALED = ".tmp"  # appended to the name while a shard is being written
FORMAT = "simpletuner-cache-1"

# dtype names of the safetensors format
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8  # bytes; every tensor must start at a multiple of its element size
_PADDING = "padding"  # name of the tensor that fills a record up to the alignment


class PackedRecord(NamedTuple):
    """A record as bytes. `layout` is JSON: [[tensor name, dtype name, shape], ...] in the order of the bytes."""

    key: bytes
    layout: str
    payload: bytes
    crc: int


@dataclass(frozen=True)
class RecordEntry:
    """The position of a record in its shard."""

    key: bytes
    layout: str
    offset: int  # bytes from the start of the file
    size: int  # bytes
    crc: int


class DamagedShardError(Exception):
    """A file is not a complete shard. The message is the reason, such as "it is cut off"."""


def pack(key: bytes, tensors: Mapping[str, Tensor]) -> PackedRecord:
    """Copy tensors into a record. They must be on the CPU, with a dtype of `_DTYPES`; any shape."""
    # Widest elements first, so that every tensor starts at a multiple of its own element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    parts = [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for _, tensor in ordered]
    layout = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    surplus = sum(map(len, parts)) % _ALIGNMENT
    if surplus:
        parts.append(bytes(_ALIGNMENT - surplus))
        layout.append((_PADDING, "U8", (len(parts[-1]),)))
    payload = parts[0] if len(parts) == 1 else b"".join(parts)
    return PackedRecord(key, _layout_text(tuple(layout)), payload, zlib.crc32(payload))


def unpack(layout: str, payload: bytearray) -> dict[str, Tensor]:
    """The tensors of a record. They share the memory of `payload`."""
    return {
        name: torch.frombuffer(payload, dtype=dtype, count=count, offset=offset).view(shape)
        for name, dtype, shape, count, offset in _layout_parts(layout)
    }


@contextmanager
def sealed_shard(path: Path, records: Sequence[PackedRecord]) -> Iterator[list[RecordEntry]]:
    """Write a shard durably under its final name, and yield where its records lie. The file stays locked while the block runs.

    The caller adds the shard to the index in the block. Until then the lock tells other processes that the file's writer is alive.
    StorageError if it cannot be written; no file with the final name is left then.
    """
    header, positions = _header(records)
    aside = path.with_name(path.name + UNSEALED)
    try:
        with locked(aside) as file:  # closing a file that could not be written fails a second time
            file.write(header)
            for record in records:
                file.write(record.payload)
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
            yield positions
    except OSError as error:
        raise StorageError(f"{path.parent}: the cache cannot be written: {error.strerror or error}.") from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def unused_file(path: Path) -> Iterator[bool]:
    """Yield True, with the file locked during the block, if no running process holds its lock. False too if the file is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def read_header(path: Path) -> list[RecordEntry]:
    """The records of a sealed shard, from its own metadata. DamagedShardError if it is not one."""
    with path.open("rb") as file:
        return parse_header(file, path.stat().st_size)


def parse_header(file: BinaryIO, size: int) -> list[RecordEntry]:
    """As `read_header`, for a stream at the first byte of a shard of `size` bytes. Reads nothing after the header."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - 8:
        raise DamagedShardError("it is cut off")
    try:
        header = parse_json(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata.get("format") != FORMAT:
            raise DamagedShardError("it is not a cache shard of this version")
        crcs = parse_json(metadata["crc32"])
        tensors: dict[str, list[tuple[str, str, list[int], int, int]]] = {}
        for name, entry in header.items():
            key, _, tensor = name.partition("/")
            tensors.setdefault(key, []).append((tensor, entry["dtype"], entry["shape"], *entry["data_offsets"]))
        records = [_entry(key, parts, 8 + length, int(crcs[key])) for key, parts in tensors.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShardError(f"its header is damaged: {error!r}") from error
    if any(record.offset + record.size > size for record in records):
        raise DamagedShardError("it is cut off")
    return records


def map_file(path: Path, size: int) -> memoryview:
    """The bytes of a shard, memory-mapped. DamagedShardError if the file is missing or not `size` bytes long."""
    try:
        if path.stat().st_size != size:
            raise DamagedShardError(f"it is not {size:,} bytes long")
        # torch closes the file after mapping it; Python's mmap keeps one file descriptor open per shard.
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise DamagedShardError(f"it cannot be opened: {error}") from error
    return memoryview(mapped.numpy())  # type: ignore[arg-type]  # NumPy's stubs hide the buffer protocol


def locked(path: Path) -> BinaryIO:
    """Create a file and lock it. FileExistsError if it exists."""
    while True:
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # between the two calls another process took it for a leftover and removed it


def _header(records: Sequence[PackedRecord]) -> tuple[bytes, list[RecordEntry]]:
    entries: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "crc32": json.dumps({record.key.hex(): record.crc for record in records})}
    }
    offsets = []
    end = 0
    for record in records:
        offsets.append(end)
        key = record.key.hex()
        for name, dtype_name, shape, count, offset in _layout_entries(record.layout):
            start = offsets[-1] + offset
            bounds = [start, start + count * _DTYPES[dtype_name].itemsize]
            entries[f"{key}/{name}"] = {"dtype": dtype_name, "shape": shape, "data_offsets": bounds}
        end += len(record.payload)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    positions = [
        RecordEntry(record.key, record.layout, start + offset, len(record.payload), record.crc)
        for record, offset in zip(records, offsets, strict=True)
    ]
    return len(text).to_bytes(8, "little") + text, positions


def _entry(key: str, parts: list[tuple[str, str, list[int], int, int]], data_start: int, crc: int) -> RecordEntry:
    parts.sort(key=lambda part: part[3])
    layout = _layout_text(tuple((name, dtype, tuple(shape)) for name, dtype, shape, _, _ in parts))
    start = parts[0][3]
    return RecordEntry(bytes.fromhex(key), layout, data_start + start, parts[-1][4] - start, crc)


@lru_cache(maxsize=4096)
def _layout_text(layout: tuple[tuple[str, str, tuple[int, ...]], ...]) -> str:
    return json.dumps(layout, separators=(",", ":"))


@lru_cache(maxsize=4096)
def _layout_entries(layout: str) -> list[tuple[str, str, list[int], int, int]]:
    """For each tensor, padding included: name, dtype name, shape, number of elements, offset in the record in bytes."""
    entries = []
    offset = 0
    for name, dtype_name, shape in json.loads(layout):
        count = 1
        for side in shape:
            count *= side
        entries.append((name, dtype_name, shape, count, offset))
        offset += count * _DTYPES[dtype_name].itemsize
    return entries


@lru_cache(maxsize=4096)
def _layout_parts(layout: str) -> list[tuple[str, torch.dtype, list[int], int, int]]:
    return [
        (name, _DTYPES[dtype], shape, count, offset) for name, dtype, shape, count, offset in _layout_entries(layout) if name != _PADDING
    ]
