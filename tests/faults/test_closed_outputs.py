"""Nothing on standard output or standard error may end a run: it goes silent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.storage.atomic import verify_manifest
from tests.harness import NO_VALIDATION, ROOT, Trainer, draw_images

TALK = """
import contextlib, logging, os, signal, sys, traceback
from helpers.streams import make_unfailing
make_unfailing()
from helpers.reporting.console import Console
from helpers.training.stopping import StopRequest
stop = StopRequest().listen()
os.kill(os.getpid(), signal.SIGHUP)
console = Console()
console.chapter("settings", "a line")
with console.progress("scan", 3, "files") as advance:
    advance(3)
logging.warning("a library warns")
print("and prints", flush=True)
traceback.print_exception(ValueError("of ours"))
console.failed("stopped")
opened = open(sys.argv[1], "w")
for descriptor in (1, 2):
    with contextlib.suppress(OSError):
        os.write(descriptor, b"not into the file")
os._exit(75 if stop.asked and not os.path.getsize(sys.argv[1]) else 1)
"""


def full_disk() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def reader_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def never_opened() -> None:
    for descriptor in (0, 1, 2):
        os.close(descriptor)


def terminal_gone() -> None:
    terminal, shown = os.openpty()
    os.close(terminal)
    os.dup2(shown, 1)
    os.dup2(shown, 2)


@pytest.mark.parametrize("outputs", [full_disk, reader_gone, never_opened, terminal_gone])
def test_a_program_whose_outputs_fail_runs_to_its_own_end(outputs: Callable[[], None], tmp_path: Path) -> None:
    command = [sys.executable, "-c", TALK, str(tmp_path / "first file opened")]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=outputs).returncode == 75


@pytest.mark.parametrize("outputs", [full_disk, reader_gone])
def test_refused_settings_keep_their_exit_code(outputs: Callable[[], None], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "helpers" / "launch.py"), "--nonsense"]
    assert subprocess.run(command, cwd=tmp_path, preexec_fn=outputs).returncode == 2


@pytest.mark.slow
def test_a_closed_terminal_saves_and_the_same_command_resumes(tmp_path: Path) -> None:
    trainer = Trainer(draw_images(tmp_path / "images"), tmp_path, settings={**NO_VALIDATION, "max_train_steps": 500})
    output = tmp_path / "out"
    script = [str(Path(__file__).with_name("on_a_terminal.py")), str(output / "metrics.jsonl"), "3"]
    closed = trainer.run(through=script, checkpointing_steps=500)
    assert closed.code == 75
    losses = closed.losses
    [saved] = output.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 3 <= step < 500 and verify_manifest(saved) == []
    assert trainer.finish(max_train_steps=step + 1).losses[:step] == losses
    assert not list(output.rglob("*-wal")), "a run that has ended leaves its databases complete"
