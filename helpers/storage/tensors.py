"""Safetensors files with reproducible bytes: the same tensors and metadata always give the same file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
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


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None where there is none."""
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def not_finite_in(path: Path) -> str | None:
    """The same for a safetensors file, which is read tensor by tensor."""
    return next((name for name, tensor in _each_tensor(path) if not _is_finite(tensor)), None)


def _each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            yield name, file.get_tensor(name)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats know no comparison
    return all(math.isfinite(end) for end in wide.aminmax())  # NaN is passed on
