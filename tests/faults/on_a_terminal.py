"""Runs a program on a terminal that is closed once a file has some lines: `python on_a_terminal.py FILE LINES PROGRAM ARGUMENTS...`"""

from __future__ import annotations

import fcntl
import os
import pathlib
import runpy
import sys
import termios
import threading
import time


def close_later(terminal: int, file: pathlib.Path, lines: int) -> None:
    """As a terminal emulator that ends: what it showed is gone, and the kernel sends SIGHUP to the program on it."""
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        os.set_blocking(terminal, False)
        try:
            os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(terminal)


def main() -> None:
    file, lines, *program = sys.argv[1:]
    terminal, shown = os.openpty()
    os.setsid()
    fcntl.ioctl(shown, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(shown, descriptor)
    os.close(shown)
    threading.Thread(target=close_later, args=(terminal, pathlib.Path(file), int(lines)), daemon=True).start()
    sys.argv = program
    sys.path.insert(0, str(pathlib.Path(program[0]).parent))
    runpy.run_path(program[0], run_name="__main__")


main()
