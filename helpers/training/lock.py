"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from helpers.errors import UserError
from helpers.storage.atomic import open_own

LOCK_FILE = ".lock"


def lock_folder(folder: Path, option: str) -> IO[str]:
    """Lock a folder until this process ends, however it ends. Raises UserError that names the option and the process holding the lock.

    StorageError if there is a link or a special file instead of the lock file.

    It is a kernel lock on an open file: a killed run leaves the file behind, but not the lock.
    """
    stream = open_own(folder / LOCK_FILE)
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
