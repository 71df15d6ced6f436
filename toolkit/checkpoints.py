"""List, verify and clean up the checkpoints of a run.

    ./simpletuner checkpoints list OUTPUT_DIR              every checkpoint, with its step, size and state
    ./simpletuner checkpoints verify OUTPUT_DIR            read every byte and compare it with the manifest
    ./simpletuner checkpoints clean OUTPUT_DIR [--delete]  what runs set aside (left-..., damaged-...) or left half-written

Only `clean --delete` changes anything. `latest` marks the checkpoint that the next start resumes from.
Exit codes: 0 no problem, 1 a checkpoint is damaged, 2 refused.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from helpers.errors import StorageError, UserError
from helpers.storage.atomic import is_leftover, verify_manifest
from helpers.training.lock import LOCK_FILE, lock_folder

WELL, DAMAGED, REFUSED = 0, 1, 2
_NAME = re.compile(r"((?P<reason>left|damaged)-)?checkpoint-(?P<step>\d+)(-\d+)?")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        if not chosen.output_dir.is_dir():
            raise UserError(f"{chosen.output_dir} is not a folder: name the OUTPUT_DIR of a run.")
        code: int = chosen.command(chosen)
        return code
    except (UserError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./simpletuner checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    known: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
        "list": (_list, "List every checkpoint with its step, size and state."),
        "verify": (_verify, "Read every byte of every checkpoint and compare it with the manifest."),
        "clean": (_clean, "List or delete what runs set aside or left half-written."),
    }
    for name, (run, help) in known.items():
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
        added.set_defaults(command=run)
    commands.choices["clean"].add_argument("--delete", action="store_true", help="delete what is listed; without it nothing is changed")
    return parser


def _list(chosen: argparse.Namespace) -> int:
    found = list(_checkpoints(chosen.output_dir))
    for folder, reason in found:
        print(f"{folder.name:<32}{_size(folder):>12}  {reason or 'a checkpoint of this run'}")
    print(f"checkpoints in {chosen.output_dir}: {len(found)}")
    return WELL


def _verify(chosen: argparse.Namespace) -> int:
    is_first, damaged = True, 0
    for folder, reason in _checkpoints(chosen.output_dir):
        problems = verify_manifest(folder)
        damaged += bool(problems) and not reason
        state = f"DAMAGED: {problems[0]}" if problems else "every byte is as it was written"
        is_latest = is_first and not problems and not reason
        is_first &= not is_latest
        print(f"{folder.name:<32}{state}{' (latest)' if is_latest else ''}")
    if is_first:
        print("no checkpoint is intact: a start with this OUTPUT_DIR is refused" if damaged else "no checkpoint")
    return DAMAGED if damaged else WELL


def _clean(chosen: argparse.Namespace) -> int:
    """Take the lock of the folder: what a run in progress has half-written is not to be deleted."""
    lock = lock_folder(chosen.output_dir, "OUTPUT_DIR") if (chosen.output_dir / LOCK_FILE).exists() else None
    aside = [folder for folder, reason in _checkpoints(chosen.output_dir) if reason]
    found = [*aside, *sorted(path for path in chosen.output_dir.iterdir() if is_leftover(path))]
    for path in found:
        print(f"{path.name:<48}{_size(path):>12}{'  deleted' if chosen.delete else ''}")
        if chosen.delete:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    print(f"files and folders: {len(found)}" + ("" if chosen.delete or not found else "; --delete deletes them"))
    if lock is not None:
        lock.close()
    return WELL


def _checkpoints(output_dir: Path) -> Iterator[tuple[Path, str]]:
    """Every checkpoint, and the reason why it was set aside: "" for those of the run. Those of the run first, the newest step first."""
    found = [(match, path) for path in output_dir.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))]
    for match, path in sorted(found, key=lambda each: (each[0]["reason"] or "", -int(each[0]["step"]), each[1].name)):
        reasons = {"left": "set aside when an earlier checkpoint was resumed", "damaged": "set aside as damaged", None: ""}
        yield path, reasons[match["reason"]]


def _size(path: Path) -> str:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.lstat().st_size
    return f"{size / 1e6:,.1f} MB"
