"""OUTPUT_DIR/SAVE and OUTPUT_DIR/STOP: empty files by which somebody outside asks a run to save, or to save and stop.

touch /home/user/training/models/STOP
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from pathlib import Path

from helpers.streams import emit
from helpers.training.stopping import StopRequest

SAVE, STOP = "SAVE", "STOP"
POLL_SECONDS = 1.0


def remove_old_requests(folder: Path) -> list[str]:
    """Remove requests that were made before this start => their names. They were meant for an earlier run."""
    return [name for name in (SAVE, STOP) if _take(folder / name)]


def watch(folder: Path, stop: StopRequest, poll_seconds: float = POLL_SECONDS) -> None:
    """From now on, turn these files into requests, and remove them. One process does this; the others hear of it as of a signal.

    It ends with the run that `stop` belongs to.
    """
    run = weakref.ref(stop)

    def poll() -> None:
        while True:
            time.sleep(poll_seconds)
            if (stop := run()) is None:
                return
            if _take(folder / SAVE):
                stop.ask_to_save()
            if _take(folder / STOP):
                stop.asked = True
                emit(2, f"\n{folder / STOP} found: finishing this step, then saving.\n".encode())
                return
            del stop

    threading.Thread(target=poll, name="request files", daemon=True).start()


def _take(file: Path) -> bool:
    """Remove a file, and say whether it was there. One that cannot be removed is no request: it would be one again and again."""
    try:
        os.unlink(file)
    except OSError:
        return False
    return True
