"""Tensor files: the same bytes for the same tensors, and what cannot be written in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.errors import StorageError
from helpers.storage.tensors import save_tensors


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    """The library alone would write metadata in an order that changes from one process and one call to the next."""
    metadata = {f"name {number}": str(number) for number in range(50)}
    for name in ("one", "other"):
        save_tensors({"weight": torch.arange(6.0).view(2, 3)}, tmp_path / name, dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    header = (tmp_path / "one").read_bytes()
    positions = [header.index(f'"{name}"'.encode()) for name in sorted(metadata)]
    assert positions == sorted(positions)


def test_a_file_that_cannot_be_written_is_a_storage_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not be written"):
        save_tensors({"weight": torch.zeros(3)}, tmp_path / "gone" / "weights.safetensors")
