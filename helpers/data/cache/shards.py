"""One file of a cache: an ordinary safetensors file of many records, each a few named tensors under a key, with a checksum.

In the file a tensor is called `<key in hex>/<name>`; `crc32` in the metadata gives the checksum of each record's bytes, which lie
together. Any tool that opens safetensors can read a shard, and a lost index can be made again from the shards alone.
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
from helpers.storage.atomic import sync_folder

SUFFIX = ".safetensors"
UNSEALED = ".tmp"  # appended while a shard is being written
FORMAT = "simpletuner-cache-1"

# The names of the safetensors format.
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
_ALIGNMENT = 8  # bytes; readers of safetensors want each tensor at a multiple of its element size
_PADDING = "padding"  # name of the tensor that fills a record up to the alignment


class Packed(NamedTuple):
    """A record as bytes. `layout` is JSON: [[tensor name, dtype name, shape], ...] in the order of the bytes."""

    key: bytes
    layout: str
    payload: bytes
    crc: int


@dataclass(frozen=True)
class Placed:
    """Where a record lies in its shard."""

    key: bytes
    layout: str
    offset: int  # bytes from the start of the file
    size: int  # bytes
    crc: int


class DamagedShardError(Exception):
    """A file that is not a whole shard; the message says what is wrong with it."""


def pack(key: bytes, tensors: Mapping[str, Tensor]) -> Packed:
    """Tensors on the CPU, of any shape and of the dtypes of safetensors => a record, copied."""
    # Wide elements first, so that every tensor begins at a multiple of its own element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    parts = [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for _, tensor in ordered]
    layout = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    surplus = sum(map(len, parts)) % _ALIGNMENT
    if surplus:
        parts.append(bytes(_ALIGNMENT - surplus))
        layout.append((_PADDING, "U8", (len(parts[-1]),)))
    payload = parts[0] if len(parts) == 1 else b"".join(parts)
    return Packed(key, _layout_text(tuple(layout)), payload, zlib.crc32(payload))


def unpack(layout: str, payload: bytearray) -> dict[str, Tensor]:
    """The tensors of a record; they share the memory of `payload`."""
    return {
        name: torch.frombuffer(payload, dtype=dtype, count=count, offset=offset).view(shape)
        for name, dtype, shape, count, offset in _layout_parts(layout)
    }


@contextmanager
def sealed_shard(path: Path, records: Sequence[Packed]) -> Iterator[list[Placed]]:
    """Write a shard durably under its final name, and hold its lock until the caller has committed it to the index.

    The lock tells other processes that the writer of an uncommitted file is alive. StorageError, and no file under the final
    name, when it cannot be written.
    """
    header, placed = _header(records)
    aside = path.with_name(path.name + UNSEALED)
    try:
        with locked(aside) as file:  # closing a file whose bytes could not be written fails once more
            file.write(header)
            for record in records:
                file.write(record.payload)
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
            yield placed
    except OSError as error:
        raise StorageError(f"{path.parent}: the cache cannot be written: {error.strerror or error}.") from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether a file is nobody's: true, and locked for the duration, unless a living process holds its lock or it is gone."""
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


def read_header(path: Path) -> list[Placed]:
    """The records of a sealed shard, from its own metadata. DamagedShardError when it is not one."""
    with path.open("rb") as file:
        return parse_header(file, path.stat().st_size)


def parse_header(file: BinaryIO, size: int) -> list[Placed]:
    """`read_header` of a stream at the first byte of a shard of `size` bytes; nothing behind the header is read."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - 8:
        raise DamagedShardError("it is cut off")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata.get("format") != FORMAT:
            raise DamagedShardError("it is no cache shard of this version")
        crcs = json.loads(metadata["crc32"])
        tensors: dict[str, list[tuple[str, str, list[int], int, int]]] = {}
        for name, entry in header.items():
            key, _, tensor = name.partition("/")
            tensors.setdefault(key, []).append((tensor, entry["dtype"], entry["shape"], *entry["data_offsets"]))
        placed = [_placed(key, parts, 8 + length, int(crcs[key])) for key, parts in tensors.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShardError(f"its header is damaged: {error!r}") from error
    if any(record.offset + record.size > size for record in placed):
        raise DamagedShardError("it is cut off")
    return placed


def map_file(path: Path, size: int) -> memoryview:
    """A shard's bytes, mapped into memory without keeping the file open. DamagedShardError when it is not `size` bytes long."""
    try:
        if path.stat().st_size != size:
            raise DamagedShardError(f"it is not {size} bytes long")
        # torch closes the file once it is mapped; Python's mmap would use up one open file per shard.
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise DamagedShardError(f"it cannot be opened: {error}") from error
    return memoryview(mapped.numpy())  # type: ignore[arg-type]  # NumPy's stubs hide the buffer protocol


def locked(path: Path) -> BinaryIO:
    """A new file with its lock held. Until the lock is held, a collector may take the file for a dead process's and remove it."""
    while True:
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()


def _header(records: Sequence[Packed]) -> tuple[bytes, list[Placed]]:
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
    placed = [
        Placed(record.key, record.layout, start + offset, len(record.payload), record.crc)
        for record, offset in zip(records, offsets, strict=True)
    ]
    return len(text).to_bytes(8, "little") + text, placed


def _placed(key: str, parts: list[tuple[str, str, list[int], int, int]], data_start: int, crc: int) -> Placed:
    parts.sort(key=lambda part: part[3])
    layout = _layout_text(tuple((name, dtype, tuple(shape)) for name, dtype, shape, _, _ in parts))
    start = parts[0][3]
    return Placed(bytes.fromhex(key), layout, data_start + start, parts[-1][4] - start, crc)


@lru_cache(maxsize=4096)
def _layout_text(layout: tuple[tuple[str, str, tuple[int, ...]], ...]) -> str:
    return json.dumps(layout, separators=(",", ":"))


@lru_cache(maxsize=4096)
def _layout_entries(layout: str) -> list[tuple[str, str, list[int], int, int]]:
    """(name, dtype name, shape, elements, offset in the record's bytes) of each tensor, padding included."""
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
