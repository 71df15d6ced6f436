"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from helpers.errors import UserError

LOCK_FILE = ".lock"


def lock_folder(folder: Path, option: str) -> IO[str]:
    """Hold a folder until the process ends, however it ends. Raises UserError naming the option and the process that holds it.

    The lock is the kernel's, on an open file: a killed run leaves the file but not the lock.
    """
    stream = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        stream.close()
        raise UserError(
            f"{option}={folder} is in use by another run (pid {holder}): wait for it, stop it, or choose another folder."
        ) from None
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return stream
