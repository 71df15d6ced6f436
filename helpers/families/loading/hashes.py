"""Content hashes of weights and configs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from helpers.storage.memo import Memo, digest_of, file_state


class WeightsHashes:
    """SHA-256 of weight and configuration files. A memo keeps them, so that a later start reads no weights."""

    def __init__(self, memo: Memo) -> None:
        self.memo = memo

    def hash_folders(self, *folders: Path) -> str:
        """One hash over every weight and configuration file of these folders."""
        return self.hash_files(
            (str(path.relative_to(folder)), path)
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".json", ".txt", ".model")
        )

    def hash_files(self, files: Iterable[tuple[str, Path]]) -> str:
        """One hash over files and the names that they are given."""
        digest = hashlib.sha256()
        for name, path in files:
            digest.update(f"{name} {self.of_file(path)}\n".encode())
        return digest.hexdigest()

    def of_file(self, path: Path) -> str:
        """64 hex digits. The file is read again when its size, times or inode differ from when it was last read."""

        def hash_content() -> str:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

        return self.memo.recall(f"sha256 of {path.resolve()}", digest_of(file_state(path)), hash_content)


def fingerprint(facts: Mapping[str, object]) -> str:
    """A short name for a set of facts; another name for anything else."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
