"""What earlier starts worked out, so that a start from which nothing differs need not work it out again.

Each result lies beside a digest of everything that it was made from; under another digest it does not exist. Losing the folder costs
time and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.storage.atomic import write_file, write_json


def inputs_digest(*parts: object) -> str:
    """32 hex digits that depend on every part, as JSON shows it; what JSON does not know, by its text."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Remembered:
    """Results by name in a folder of ours. One process writes, any number read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def value(self, name: str, inputs: str) -> Any | None:
        """The JSON value of a result, or None where it is not known for these inputs."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found["value"] if isinstance(found, dict) and found.get("inputs") == inputs else None

    def array(self, name: str, inputs: str) -> NDArray[Any] | None:
        """An array kept by `keep_array`, in memory of our own; None where it is not known for these inputs, or is cut off."""
        if self.value(name, inputs) is None:
            return None
        try:
            return np.load(self.folder / f"{name}.npy", allow_pickle=False)
        except (OSError, ValueError):
            return None

    def keep(self, name: str, inputs: str, value: Any) -> None:
        """Remember a JSON value other than None. StorageError when it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{name}.json", {"inputs": inputs, "value": value})

    def keep_array(self, name: str, inputs: str, array: NDArray[Any]) -> None:
        """Remember an array. StorageError when it cannot be written."""
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.json").unlink(missing_ok=True)  # first: the array that follows is another one
        write_file(self.folder / f"{name}.npy", content.getvalue())
        self.keep(name, inputs, len(array))
