"""Files and folders that are either whole or not there: written aside, flushed to disk, then renamed.

What is in the making lies beside its final place under a hidden name, `.<name>.tmp.<pid>.<random>`, which nothing mistakes
for a finished file or checkpoint. `remove_leftovers` clears what a killed process left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.errors import StorageError

MANIFEST = "manifest.json"
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)\.\d+\.[0-9a-f]{8}")


def write_file(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was and raise StorageError. Durable when it returns."""
    path = Path(path)
    aside = _aside(path, "tmp")
    try:
        with _storage_errors(path):
            with aside.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # gone already when all went well; else the error on its way says more
            aside.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """`write_file` of readable JSON, keys in the order given. ValueError for NaN and infinity, which JSON does not have."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Gives a folder to fill; on leaving without an error it becomes `final`, durably. Otherwise `final` stays as it was.

    A folder that already has this name is replaced. OSErrors, those of the body included, become StorageErrors.
    """
    final = Path(final)
    aside = _aside(final, "tmp")
    try:
        with _storage_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            aside.mkdir()
            yield aside
            _share(aside)
            sync_tree(aside)
            _put_in_place(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(parent: str | Path, name: str) -> Iterator[Path]:
    """A folder beside the finished ones for what is not finished, gone when left; `remove_leftovers` clears a killed one's."""
    aside = _aside(Path(parent) / name, "tmp")
    try:
        with _storage_errors(aside):
            aside.mkdir(parents=True)
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Clear what killed processes left in `folder` and return its paths. Only for the holder of the folder's lock.

    A replaced folder whose replacement never took its place is put back.
    """
    removed = []
    for path in sorted(Path(folder).iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match["name"])
        with _storage_errors(path):
            if match["kind"] == "old" and not final.exists():
                os.rename(path, final)
                sync_folder(path.parent)
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        removed.append(path)
    return removed


def write_manifest(folder: str | Path) -> None:
    """Record size and SHA-256 of every file below `folder` in its manifest.json. Called last: what it lists is complete."""
    folder = Path(folder)
    with _storage_errors(folder / MANIFEST):
        files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder)}
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: str | Path) -> list[str]:
    """What is wrong with a folder, one sentence each naming the file; nothing when every byte is as it was written."""
    folder = Path(folder)
    try:
        recorded = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {str(name): (int(facts["size"]), str(facts["sha256"])) for name, facts in recorded.items()}
    except FileNotFoundError:
        return [f"{folder} has no {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    present = dict(_files(folder))
    problems = [f"{folder / name} is not in {MANIFEST}" for name in sorted(present.keys() - expected.keys())]
    for name, (size, digest) in expected.items():
        if name not in present:
            problems.append(f"{folder / name} is missing")
        elif (actual := present[name].stat().st_size) != size:
            problems.append(f"{present[name]} has {actual} bytes instead of {size}")
        elif _sha256(present[name]) != digest:
            problems.append(f"{present[name]} differs from what was written")
    return problems


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable: without it, a rename may be forgotten when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and every name below a folder durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(parent))


def _aside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}.{os.getpid()}.{secrets.token_hex(4)}")


def _share(folder: Path) -> None:
    """Give files the permissions that the user's umask gives new ones; the safetensors library makes its files private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename a finished folder to its name; one that is there already is moved away first and removed last."""
    old = _aside(final, "old") if final.exists() else None
    if old is not None:
        os.rename(final, old)
    try:
        os.rename(aside, final)
    except OSError:
        if old is not None:
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # the new folder stands; `remove_leftovers` gets what is left of this one


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative names and paths of all files but the manifest, sorted by name."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            yield name, path


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """An OSError met while writing `path` becomes a sentence about it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from error
