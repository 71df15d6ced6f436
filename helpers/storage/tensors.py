"""Safetensors files with reproducible bytes: the same tensors and metadata always give the same file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. The same tensors and metadata always give the same bytes, so that runs can be compared.

    StorageError if it cannot be written; the caller deletes the incomplete file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, dict(metadata or {"format": "pt"}))
        _sort_metadata(path)
    except (SafetensorError, OSError) as error:  # the library reports a full disk as its own error
        raise StorageError(f"{path} could not be written: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which the library writes in random order. The length of the header stays the same."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) != length:
            raise RuntimeError(f"the header of {path} changed its length from {length} to {len(ordered)} bytes when it was sorted")
        file.seek(8)
        file.write(ordered)
