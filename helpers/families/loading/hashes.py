"""Names for what weights and settings are: other weights or settings have another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from helpers.storage.atomic import write_json


class WeightsHashes:
    """Hashes of weight files, remembered by (path, size, time) so that a warm start reads no weights."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, str] = {}
        if memory.is_file():
            try:
                self.known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                self.known = {}  # only a memory: the files themselves are hashed again

    def of(self, *folders: Path) -> str:
        """One hash over every weight and configuration file of these folders."""
        return self.of_files(
            (str(path.relative_to(folder)), path)
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".json", ".txt", ".model")
        )

    def of_files(self, files: Iterable[tuple[str, Path]]) -> str:
        """One hash over files and the names that they are given."""
        digest = hashlib.sha256()
        for name, path in files:
            digest.update(f"{name} {self.of_file(path)}\n".encode())
        return digest.hexdigest()

    def of_file(self, path: Path) -> str:
        state = path.stat()
        name = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        if name not in self.known:
            with path.open("rb") as stream:
                self.known[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.memory, self.known)
        return self.known[name]


def fingerprint(facts: Mapping[str, object]) -> str:
    """A short name for a set of facts; another name for anything else."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
