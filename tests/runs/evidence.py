"""What runs leave as evidence: their words, and folders bit for bit; how to damage those; programs that must respect their modes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from helpers.data.cache.shards import read_header
from tests.harness import ROOT, Ended, Trainer

NOBODY = 65534
_PR_CAPBSET_DROP = 24  # of <linux/prctl.h>
_ABOVE_MODES = (0, 1, 2, 3)  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: by which root ignores modes


def unwrapped(said: str) -> str:
    """What a run said as one line: the console breaks long sentences where they fit."""
    return " ".join(said.split())


def refusal(ended: Ended) -> str:
    """What a run said that was refused as it should: exit code 2, and no traceback."""
    assert ended.code == 2, ended.printed
    assert "Traceback" not in ended.printed
    return unwrapped(ended.printed)


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, modification time and SHA-256 of everything in a folder, itself included, by relative name."""
    return {str(path.relative_to(folder)): _facts(path) for path in (folder, *sorted(folder.rglob("*")))}


def _facts(path: Path) -> tuple[int, int, str]:
    found = path.lstat()
    return found.st_mode, found.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte; a negative offset counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x55
    path.write_bytes(content)


def damage_records(cache: Path) -> None:
    """Flip a byte in every record of a cache."""
    for shard in cache.glob("*.safetensors"):
        for record in read_header(shard):
            flip_byte(shard, record.offset + record.size // 2)


def make_read_only(folder: Path) -> None:
    """Modes 0555 and 0444 and, where the tests run as root, another owner."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)


def obey_modes() -> None:
    """For `preexec_fn`: the program to be started cannot override the modes of files, whoever runs it."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in _ABOVE_MODES:
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "a capability cannot be dropped")


def can_write_into(folder: Path) -> bool:
    """Whether a program that obeys modes can make a file there."""
    probe = folder / "probe"
    made = subprocess.run(["touch", str(probe)], preexec_fn=obey_modes, capture_output=True).returncode == 0
    probe.unlink(missing_ok=True)
    return made


def run_obeying_modes(trainer: Trainer, output: str = "out", **settings: object) -> Ended:
    """As `Trainer.run`, from an empty current folder, in a process that obeys modes."""
    if not (trainer.folder / "dataloader.json").exists():
        trainer.dataloader()
    here = trainer.folder / "here"
    here.mkdir(exist_ok=True)
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *trainer.flags(trainer.folder / output, **settings)],
        cwd=here,
        preexec_fn=obey_modes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return Ended(ended.returncode, ended.stdout, trainer.folder / output)
