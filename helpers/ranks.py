"""What a trainer process tells the launcher that started it, and how its life hangs on the launcher's.

`accelerate launch` neither passes signals on in good time nor returns the trainer's exit code. So the launcher gives every rank a
folder, in which it leaves its process id and, at the end, its code. Without a launcher of ours (one process, or `accelerate launch`
by hand) all of this does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers.errors import EXIT_FAULT

FOLDER_VARIABLE = "SIMPLETUNER_RANKS_FOLDER"
LAUNCHER_VARIABLE = "SIMPLETUNER_LAUNCHER_PID"
PROCESSES_VARIABLE = "SIMPLETUNER_NUM_PROCESSES"  # how many were asked for: the trainer compares it with what it got

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it is gone, however that came about. Elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether our launcher started this process, and so has judged its environment."""
    return LAUNCHER_VARIABLE in environ


def tie_to_launcher(environ: Mapping[str, str]) -> None:
    """Never outlive the launcher. The trainer's first act: what dies before it is not yet tied, and is looked at here."""
    if LAUNCHER_VARIABLE not in environ:
        return
    die_with_parent()
    try:
        os.kill(int(environ[LAUNCHER_VARIABLE]), 0)
    except ProcessLookupError:
        os._exit(EXIT_FAULT)


def announce_rank(environ: Mapping[str, str]) -> None:
    """Ask for signals. Call it once the signal handlers stand; a signal that came before is delivered then."""
    if FOLDER_VARIABLE in environ:
        _leave_note(environ, "pid", os.getpid())


def record_exit(environ: Mapping[str, str], code: int) -> int:
    """Leave the trainer's exit code for the launcher; returns the code to leave the process with.

    Call it last, with all ranks past their last barrier. On one machine the code returned is 0: the launcher has the true one, and
    accelerate would answer any other by signalling the ranks that still finish, and by a traceback about a run that ended well.
    """
    if FOLDER_VARIABLE not in environ:
        return code
    _leave_note(environ, "code", code)
    one_machine = environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE")
    return 0 if one_machine else code


def _leave_note(environ: Mapping[str, str], kind: str, number: int) -> None:
    """Write `<rank>.<kind>` whole or not at all."""
    note = Path(environ[FOLDER_VARIABLE]) / f"{environ.get('RANK', '0')}.{kind}"
    unfinished = note.with_name(note.name + ".tmp")
    unfinished.write_text(str(number))
    unfinished.replace(note)
