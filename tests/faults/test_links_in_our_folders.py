"""A link under the name of a file of ours may lead to anybody's file: it is refused, and what it leads to stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.errors import StorageError
from helpers.reporting.records import METRICS, Records
from helpers.training.lock import LOCK_FILE, lock_folder

OPENED: dict[str, Callable[[Path], object]] = {
    LOCK_FILE: lambda folder: lock_folder(folder, "--output_dir"),
    METRICS: lambda folder: Records(folder, 0, record_samples=False),
}
TRAPS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic link": lambda path, target: path.symlink_to(target),
    "hard link": lambda path, target: path.hardlink_to(target),
    "link to nothing": lambda path, target: path.symlink_to(target.with_name("new")),
    "named pipe": lambda path, target: os.mkfifo(path),
    "folder": lambda path, target: path.mkdir(),
}


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_is_written_through_a_link(name: str, trap: str, tmp_path: Path) -> None:
    target, folder = tmp_path / "important", tmp_path / "out"
    target.write_text('{"step": 1, "loss": 0.5}\n')
    folder.mkdir()
    TRAPS[trap](folder / name, target)
    with pytest.raises(StorageError, match=f"{folder / name} is a link or no regular file, so it is not written to: remove it"):
        OPENED[name](folder)
    assert target.read_text() == '{"step": 1, "loss": 0.5}\n' and not (tmp_path / "new").exists()
