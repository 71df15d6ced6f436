"""`accelerate launch` as a child: signals reach the trainer's ranks, their exit code comes back, and none of them is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from helpers.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_LEFT_AT_ONCE
from helpers.ranks import FOLDER_VARIABLE, LAUNCHER_VARIABLE, die_with_parent

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LAST_SECONDS = 5.0  # for the other ranks, once one has failed or the user wants out at once
POLL_SECONDS = 0.1


@dataclass
class Ranks:
    """The ranks of this machine, as far as they have made themselves known in `folder`."""

    folder: Path
    signals_given: dict[str, int] = field(default_factory=dict)

    def pids(self) -> dict[str, int]:
        """Rank => process id, of every rank that asked for signals."""
        return {note.stem: int(note.read_text()) for note in self.folder.glob("*.pid")}

    def codes(self) -> dict[str, int]:
        """Rank => exit code of every rank that left one, the first to leave first."""
        notes = sorted(self.folder.glob("*.code"), key=lambda note: note.stat().st_mtime_ns)
        return {note.stem: int(note.read_text()) for note in notes}

    def running(self) -> dict[str, int]:
        """Rank => process id, of those that have neither left a code nor vanished."""
        codes = self.codes()
        return {rank: pid for rank, pid in self.pids().items() if rank not in codes and _is_alive(pid)}

    def one_has_failed(self) -> bool:
        codes = self.codes()
        if any(code not in (EXIT_FINISHED, EXIT_INTERRUPTED) for code in codes.values()):
            return True
        # A rank may leave its code between the two looks, so the codes are read again for those that are gone.
        gone = [rank for rank, pid in self.pids().items() if not _is_alive(pid)]
        return bool(set(gone) - set(self.codes()))

    def deliver(self, asked: Sequence[int]) -> None:
        """Give every running rank the signals it has not had, also those that came before it was ready."""
        for rank, pid in self.running().items():
            for number in asked[self.signals_given.get(rank, 0) :]:
                _signal(pid, number)
            self.signals_given[rank] = len(asked)

    def kill(self) -> None:
        # Also those that left a code: one that hangs after its last word must not stay.
        for pid in self.pids().values():
            if _is_alive(pid):
                _signal(pid, signal.SIGKILL)


def supervise(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command, whose processes use `helpers.ranks`; returns the trainer's exit code (see `verdict`)."""
    with tempfile.TemporaryDirectory(prefix="simpletuner-ranks-") as folder:
        asked = _listen()
        ranks = Ranks(Path(folder))
        environment = {**environ, FOLDER_VARIABLE: folder, LAUNCHER_VARIABLE: str(os.getpid())}
        # A session of its own keeps the terminal's Ctrl-C from reaching it beside ours; it dies with us even under kill -9.
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
        _watch(child, ranks, asked)
        return verdict(ranks.codes(), set(ranks.pids()), child.returncode, asked)


def verdict(codes: Mapping[str, int], announced: set[str], child_code: int, asked: Sequence[int]) -> int:
    """One exit code for all ranks. `codes` in the order they were left.

    The first fault counts; a rank that vanished without a word is one. Then 130, when one left at once; then 75, when one was
    interrupted after a good save; else 0. If no rank ever spoke, what accelerate itself said.
    """
    for code in codes.values():
        if code not in (EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_LEFT_AT_ONCE):
            return code
    vanished = bool(announced - set(codes))
    if EXIT_LEFT_AT_ONCE in codes.values() or (len(asked) > 1 and (vanished or not codes)):
        return EXIT_LEFT_AT_ONCE
    if vanished:
        return EXIT_FAULT
    if EXIT_INTERRUPTED in codes.values():
        return EXIT_INTERRUPTED
    return child_code if child_code >= 0 else EXIT_FAULT


def _listen() -> list[int]:
    """Signals that arrive from now on, in order."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    for number in FORWARDED:
        # Under nohup a hang-up is to be ignored, and stays so.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return asked


def _watch(child: subprocess.Popen[bytes], ranks: Ranks, asked: Sequence[int]) -> None:
    """Return when the child and all ranks are gone."""
    deadline = float("inf")
    while child.poll() is None:
        ranks.deliver(asked[:2])  # the first asks to save and stop, the second to leave at once; more say nothing new
        wants_out = len(asked) > 1
        if deadline == float("inf") and (wants_out or ranks.one_has_failed()):
            deadline = time.monotonic() + (LAST_SECONDS if ranks.running() else 0.0)
        if time.monotonic() >= deadline:
            # The child first: it would report at length on ranks that die before it.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(POLL_SECONDS)
    ranks.kill()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it left in the meantime, which its code tells
