"""Programs of the project in processes in which everything is imported already.

Importing torch, transformers and diffusers takes most of the time of a short run. Here a server (multiprocessing's fork server) imports
them once, and every program is forked from it: a process of its own, with its own arguments, environment, folder, output, signals and
exit code. What a program does before these imports, and variables that the libraries read while they are imported, need a plain process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "tests.warm_imports"


@dataclass(frozen=True)
class Finished:
    """A program that has ended. code: its exit code, or minus the number of the signal that ended it."""

    code: int
    output: str


class Program:
    """`python *arguments` of the project in `checkout`, started in `folder`: a script's path, or `-m` and a module's name.

    `variables` are added to this process's own. It is used as a subprocess.Popen whose two outputs go into one text.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None, checkout: Path = ROOT) -> None:
        self.args = list(arguments)
        descriptor, name = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        self._output = Path(name)
        weakref.finalize(self, self._output.unlink, missing_ok=True)
        environ = {**os.environ, **(variables or {})}
        self._process = serving().Process(target=_become, args=(self.args, str(checkout), str(folder), environ, name))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, self.output())
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.output(), None

    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_program(
    arguments: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None, checkout: Path = ROOT, timeout: float = 300
) -> Finished:
    """Run a Program to its end. Raises subprocess.TimeoutExpired, and ends it, when it takes longer than `timeout` seconds."""
    program = Program(arguments, folder, variables, checkout)
    try:
        output, _ = program.communicate(timeout)
    except subprocess.TimeoutExpired:
        program.kill()
        raise
    return Finished(program.wait(), output)


@functools.cache
def serving() -> ForkServerContext:
    """The server, started when the first program is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTS])
    before = dict(os.environ)
    # Python 3.11 does not pass sys.path to the server.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _become(arguments: list[str], checkout: str, folder: str, environ: dict[str, str], output: str) -> None:
    """In the new process: be `python *arguments`."""
    if IMPORTS not in sys.modules:
        raise RuntimeError(f"{IMPORTS} was not imported by the server")  # which says nothing when it cannot
    gc.unfreeze()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    if Path(checkout) != ROOT:
        _forget_the_project()
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    with contextlib.suppress(ValueError):
        sys.path.remove(str(ROOT))
    sys.path.insert(0, checkout)
    if is_module:
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _forget_the_project() -> None:
    """Another checkout has its own."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("helpers", "train")]:
        del sys.modules[name]
