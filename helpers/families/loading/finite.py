"""Weights that are not finite numbers: found before hours are spent on a model that can only answer with NaN."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from helpers.errors import ModelError
from helpers.storage.memo import Memo, digest_of, file_state
from helpers.storage.tensors import not_finite_in


def require_finite(files: Iterable[Path], memo: Memo) -> None:
    """Raises ModelError, naming file and tensor, where weights are NaN or infinite. A memo keeps the answer for each file."""
    for path in files:
        if path.suffix.lower() != ".safetensors":  # the index beside them
            continue
        if tensor := _not_finite(path, memo):
            raise ModelError(f"{path} holds numbers that are not finite, in {tensor}: fetch the model again, or use another.")


def _not_finite(path: Path, memo: Memo) -> str:
    """A tensor of the file that is not finite, or an empty text."""
    return memo.recall(f"not finite in {path.resolve()}", digest_of(file_state(path)), lambda: not_finite_in(path) or "")
