"""Programs of the project in processes in which the libraries are loaded already.

Importing torch, transformers and diffusers takes most of the time of a short run. Here a server (multiprocessing's fork server) imports
them once, and every program is forked from it: a process of its own, with its own arguments, environment, folder, output, signals and
exit code. What a program does before these imports, and variables that the libraries read while they are imported, need a plain process.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = "tests.warm_libraries"


@dataclass(frozen=True)
class Finished:
    """A program that has ended. code: its exit code, or minus the number of the signal that ended it."""

    code: int
    output: str


def run_program(arguments: Sequence[str], checkout: Path, folder: Path, variables: Mapping[str, str], seconds: float = 300) -> Finished:
    """Run `python *arguments` of the project in `checkout` (a script's path, or `-m` and a module's name), in `folder`.

    `variables` are added to this process's own. Raises TimeoutError, and ends the program, when it takes longer than `seconds`.
    """
    descriptor, name = tempfile.mkstemp(suffix=".log")
    os.close(descriptor)
    output = Path(name)
    try:
        process = _start(arguments, checkout, folder, {**os.environ, **variables}, output)
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{' '.join(arguments)} did not end in {seconds} s\n{output.read_text(errors='replace')}")
        return Finished(process.exitcode, output.read_text(encoding="utf-8", errors="replace"))
    finally:
        output.unlink()


def _start(arguments: Sequence[str], checkout: Path, folder: Path, environ: Mapping[str, str], output: Path) -> ForkServerProcess:
    context = _serving()
    process = context.Process(target=_become, args=(list(arguments), str(checkout), str(folder), dict(environ), str(output)))
    process.start()
    return process


@functools.cache
def _serving() -> ForkServerContext:
    """The server, started when the first program is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([LIBRARIES])
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
    if LIBRARIES not in sys.modules:
        raise RuntimeError(f"{LIBRARIES} was not imported by the server")  # which says nothing when it cannot
    gc.unfreeze()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    sys.path.insert(0, checkout)
    if is_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
