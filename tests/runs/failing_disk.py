"""Runs a program on a disk that fails: `python failing_disk.py CALL PATTERN ERRNO TIMES PROGRAM ARGUMENTS...`

`CALL` is open, fsync or replace; it fails with `ERRNO` for paths that hold `PATTERN`, the first `TIMES` times (0: always).
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import runpy
import sys
from collections.abc import Callable
from typing import Any


def failing(call: Callable[..., Any], path_of: Callable[..., str], pattern: str, number: int, times: int) -> Callable[..., Any]:
    """`call`, but for the paths that are to fail."""
    failed = 0

    def instead(*arguments: Any, **options: Any) -> Any:
        nonlocal failed
        path = path_of(*arguments)
        if pattern in path and (not times or failed < times):
            failed += 1
            raise OSError(number, os.strerror(number), path)
        return call(*arguments, **options)

    return instead


def main() -> None:
    call, pattern, error, times, *program = sys.argv[1:]
    number, limit = getattr(errno, error), int(times)
    if call == "fsync":
        os.fsync = failing(os.fsync, lambda file: os.readlink(f"/proc/self/fd/{file}"), pattern, number, limit)
    elif call == "replace":
        os.replace = failing(os.replace, lambda _, target: str(target), pattern, number, limit)
        os.rename = failing(os.rename, lambda _, target: str(target), pattern, number, limit)
    else:
        assert call == "open", call
        io.open = builtins.open = failing(builtins.open, lambda path, *rest: str(path), pattern, number, limit)
        assert pathlib.Path.open.__globals__["io"] is io
    sys.argv = program
    sys.path.insert(0, str(pathlib.Path(program[0]).parent))
    runpy.run_path(program[0], run_name="__main__")


main()
