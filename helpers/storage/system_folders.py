"""Folders of operating systems, NAS and tools, which are not entered: recycle bins, thumbnails, snapshots, old versions."""

from __future__ import annotations

import posixpath
import re

# Folders whose name begins with a dot are not listed here: none of them is entered.
_NAMES = frozenset(
    {
        "$recycle.bin",  # Windows
        "recycler",  # Windows XP
        "system volume information",
        "lost+found",
        "__macosx",  # in archives made on a Mac
        "network trash folder",
        "temporary items",
        "@eadir",  # Synology
        "#recycle",
        "#snapshot",
        "@tmp",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "trashbox",  # Buffalo
        "_gsdata_",  # GoodSync
    }
)
_PATTERN = re.compile(r"found\.\d{3}")  # what chkdsk restored


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name is not entered, in any letter case."""
    folded = name.casefold()
    return name.startswith(".") or folded in _NAMES or _PATTERN.fullmatch(folded) is not None


def system_folder_of(key: str) -> str | None:
    """The outermost system folder that a file's key is in, as a path; None if there is none."""
    parts = posixpath.dirname(key).split("/")
    for depth, part in enumerate(parts, start=1):
        if part not in ("", ".", "..") and is_system_folder(part):
            return "/".join(parts[:depth])
    return None
