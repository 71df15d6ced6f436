"""A copy of the repository's launching part, with a small trainer in train.py's place, driven through real bash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TRAINERS = Path(__file__).parent / "trainers"


@dataclass
class Sandbox:
    """`root` is the copied repository, `folder` the one the user calls from."""

    root: Path
    folder: Path
    notes: Path
    variables: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def trainer(self, name: str) -> None:
        """Put tests/launch/trainers/NAME.py in train.py's place."""
        shutil.copy(TRAINERS / f"{name}.py", self.root / "train.py")

    def start(
        self, *arguments: str, wrapper: str = "train_sdxl.sh", python: str = sys.executable, **variables: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self.root / wrapper), *arguments],
            cwd=self.folder,
            env={**os.environ, "SIMPLETUNER_PYTHON": python, "STANDIN_NOTES": str(self.notes), **self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a process group of its own, as a terminal gives
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **how: str) -> subprocess.CompletedProcess[str]:
        """Start it (see `start`) and wait for the end."""
        process = self.start(*arguments, **how)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def told(self, *arguments: str, **variables: str) -> dict[str, Any]:
        """What the `settings` trainer was told."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("told "))[5:]))

    def noted(self, what: str, rank: int = 0, within_s: float = 300) -> int:
        """The process id of a rank, once it has noted this."""
        note = self.notes / f"{what}-{rank}"
        process = self.started[-1]
        wait_until(lambda: note.exists() or process.poll() is not None, within_s)
        assert note.exists(), process.communicate()[1]
        return int(note.read_text())


@pytest.fixture
def sandbox(tmp_path: Path, repository: Path) -> Iterator[Sandbox]:
    root = tmp_path / "the repository"
    root.mkdir()
    for name in ("train_sdxl.sh", "train_sd2x.sh", "train_sd3.sh", "ubuntu.sh"):
        shutil.copy(repository / name, root)
    shutil.copytree(repository / "helpers", root / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    box = Sandbox(root, tmp_path / "a user's folder", tmp_path / "notes")
    for folder in (box.folder, box.notes, box.folder / "images"):
        folder.mkdir()
    (box.folder / "data.json").write_text(json.dumps([{"id": "images", "type": "local", "instance_data_dir": "images"}]))
    box.trainer("settings")
    yield box
    for process in box.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    for note in box.notes.glob("begun-*"):
        if is_alive(int(note.read_text())):
            os.kill(int(note.read_text()), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected by its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def gone() -> Callable[[int, float], None]:
    """Wait until a process is no more."""
    return lambda pid, within_s: wait_until(lambda: not is_alive(pid), within_s)
