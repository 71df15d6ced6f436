"""What happens when a disk is full: the run ends with a sentence, or it waits until there is space again (`--disk_full=wait`).

wait_for_space(should_stop)
until_written(path, lambda: stream.write(data))
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from helpers.errors import StorageError

LOOK_SECONDS = 0.25  # between two looks at the free space, and at whether the run is asked to stop
TRY_SECONDS = 60.0  # after which it is tried again though the free space has not grown: quotas are not seen in it
GROWN_BY = 2**20  # bytes

Result = TypeVar("Result")


_LOG = logging.getLogger(__name__)
_should_stop: Callable[[], bool] | None = None  # of a run of this process that waits; None: a full disk ends the run


def wait_for_space(should_stop: Callable[[], bool] | None) -> None:
    """From now on `until_written` waits while a disk is full, until `should_stop`. None ends that."""
    global _should_stop
    _should_stop = should_stop


def until_written(path: Path, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns, which writes to `path`. Where the run waits for space, it is repeated while the disk is full.

    Otherwise, and when the run is asked to stop meanwhile, the error of the last attempt is raised. An attempt must be repeatable.
    """
    has_told = False
    while True:
        try:
            return attempt()
        except (OSError, StorageError) as error:
            if _should_stop is None or not is_full(error):
                raise
            if not has_told:
                has_told = True
                _LOG.warning("%s: the disk is full. Waiting until there is space (--disk_full=wait); Ctrl-C ends the run.", path)
            if not _is_worth_another_try(path, _should_stop):
                raise


def is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a disk or quota is full. Libraries say it in their own words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(words in str(error) for words in ("os error 28)", f"os error {errno.EDQUOT})", "disk is full")):
        return True
    return error.__cause__ is not None and is_full(error.__cause__)


def _is_worth_another_try(path: Path, should_stop: Callable[[], bool]) -> bool:
    """Wait until there is more space. False if the run is asked to stop."""
    before, until = _free(path), time.monotonic() + TRY_SECONDS
    while not should_stop():
        if time.monotonic() >= until or _free(path) >= before + GROWN_BY:
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _free(path: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(path.parent).free
    return 0
