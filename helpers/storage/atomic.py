"""Atomic writes: a file or folder is either complete or absent. It is written under another name, flushed to disk, then renamed.

    write_json("report.json", {"found": 3})
    with atomic_folder("checkpoint-100") as folder:
        (folder / "weights.safetensors").write_bytes(data)

The temporary name is `.<name>.tmp.<pid>.<random>` in the same folder. `remove_leftovers` deletes those of killed processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from helpers.errors import StorageError
from helpers.foreign_json import parse_json
from helpers.storage.full_disk import until_written

MANIFEST = "manifest.json"
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)\.\d+\.[0-9a-f]{8}")


def write_file(path: str | Path, data: bytes) -> None:
    """Replace a file's content, or leave the file unchanged and raise StorageError. Durable when it returns."""

    def write() -> None:
        with rewritten(path) as stream:
            stream.write(data)

    until_written(Path(path), write)


@contextlib.contextmanager
def rewritten(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a stream for the new content of a file, which replaces the file when the block ends. For content too large for memory.

    If the block raises, the file stays unchanged. An OSError, also one from the block, becomes a StorageError.
    """
    path = Path(path)
    aside = _aside(path, "tmp")
    try:
        with _storage_errors(path):
            with aside.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # missing after a success; after a failure the first error says more
            aside.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """`write_file` with indented JSON, keys in the order given. ValueError for NaN and infinity, which are not JSON."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Yield a folder to fill. When the block ends it is renamed to `final`, durably; if the block raises, `final` stays unchanged.

    An existing folder of this name is replaced. An OSError, also one from the block, becomes a StorageError.
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
    """A temporary folder in `parent`, deleted when the block ends. `remove_leftovers` deletes those of killed processes."""
    aside = _aside(Path(parent) / name, "tmp")
    try:
        with _storage_errors(aside):
            aside.mkdir(parents=True)
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Delete what killed processes left in `folder`, and return the paths. Only for the process that holds the folder's lock.

    If a folder was about to be replaced and its replacement is missing, the old folder is restored. StorageError for the first path for
    which that fails, after all others have been dealt with.
    """
    removed: list[Path] = []
    failures: list[StorageError] = []
    for path in sorted(Path(folder).iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match["name"])
        try:
            if match["kind"] == "old" and not final.exists():
                os.rename(path, final)
                sync_folder(path.parent)
                continue
            _delete(path)
            removed.append(path)
        except OSError as error:
            failures.append(StorageError(f"{path} is left of a killed run and could not be removed: {error.strerror or error}"))
    if failures:
        raise failures[0]
    return removed


def is_leftover(path: Path) -> bool:
    """Whether a path has the name of something half-written. A running process may still be writing it."""
    return _ASIDE.fullmatch(path.name) is not None


def remove_leftovers_below(folder: str | Path) -> list[Path]:
    """`remove_leftovers` in a folder and in every folder below it, but not where links lead."""
    removed = []
    for parent, _, _ in os.walk(folder):
        removed += remove_leftovers(parent)
    return removed


def remove_folder(folder: str | Path) -> None:
    """Remove a folder under a temporary name, so that a kill leaves nothing under its own. OSError if something stays.

    `remove_leftovers` deletes what stays.
    """
    aside = _aside(Path(folder), "tmp")
    os.rename(folder, aside)
    sync_folder(aside.parent)
    _delete(aside)


def write_manifest(folder: str | Path) -> None:
    """Write size and SHA-256 of every file below `folder` to its manifest.json. Call it last, when all files are complete."""
    folder = Path(folder)
    with _storage_errors(folder / MANIFEST):
        files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder)}
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: str | Path) -> list[str]:
    """Compare a folder with its manifest.json. One sentence for each problem, naming the file; empty if every byte is unchanged."""
    folder = Path(folder)
    try:
        recorded = parse_json((folder / MANIFEST).read_bytes())["files"]
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


def open_own(path: Path, mode: str = "a+") -> IO[Any]:
    """Open a file of ours for reading and appending; it is created if missing. `mode` is "a+" or "a+b"; bytes are unbuffered.

    A link or special file under its name is somebody's trap or mistake: StorageError, and nothing is opened. OSError as usual.
    """
    buffering = {"buffering": 0} if "b" in mode else {"encoding": "utf-8"}
    try:
        stream: IO[Any] = open(path, mode, opener=_open_without_following, **buffering)  # noqa: SIM115  # the caller closes it
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR) or isinstance(error, io.UnsupportedOperation):
            raise _not_own(path) from None
        raise
    found = os.fstat(stream.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        stream.close()
        raise _not_own(path)
    return stream


def _open_without_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # opening a pipe does not wait for its other end


def _not_own(path: Path) -> StorageError:
    return StorageError(f"{path} is a link or no regular file, so it is not written to: remove it.")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without this, a power failure may undo a rename."""
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


def _delete(path: Path) -> None:
    """Remove a file, a folder with all it holds, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _aside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}.{os.getpid()}.{secrets.token_hex(4)}")


def _share(folder: Path) -> None:
    """Give files the permissions that the user's umask allows; the safetensors library creates private files."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename a complete folder to its final name. An existing one is renamed before, and deleted after."""
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
        with contextlib.suppress(OSError):  # the new folder is in place; `remove_leftovers` deletes the rest of the old one
            _delete(old)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative names and paths of all files except the manifest, sorted by name."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            yield name, path


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from error
