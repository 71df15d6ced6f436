"""A command that behaves as `python` does, in a process in which everything is imported already: for wrappers and pages of commands.

`warm_python()` => its path, for SIMPLETUNER_PYTHON. The command is a small client. It passes its arguments, environment, folder and
standard streams to a server, which is forked from that of warm.py and forks a process for each call. Signals to the client reach that
process, its exit code (or the signal that ended it) becomes the client's, and it does not outlive the client.
`sys.executable` is the command in these processes, so that a program which becomes another one, or starts some, is quick as well.

What it understands is `[-P] [-u] (SCRIPT | -m MODULE | -c CODE) ARGUMENTS`; for anything else the client becomes the plain interpreter.
A sitecustomize.py in PYTHONPATH runs, when everything is imported. As in warm.py, what happens before that, and variables that libraries
read while they are imported, need a plain interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from pathlib import Path

from tests.warm import IMPORTS, ROOT, serving

PROJECT = ("helpers", "train", "toolkit", "demo", "benchmarks", "tests")
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
words, flags = sys.argv[1:], []
while words and words[0] in ("-P", "-u"):
    flags.append(words.pop(0))
if not words or words[0].startswith("-") and (words[0] not in ("-m", "-c") or len(words) < 2):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([__file__, flags, words, dict(os.environ), os.getcwd()]).encode("utf-8", "surrogateescape")
socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
server.sendall(call)
answers = server.makefile("r")
child = int(answers.readline())
for number in numbers:
    signal.signal(number, lambda number, frame: os.kill(child, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def warm_python() -> str:
    """The path of the command; its server ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address = str(folder / "server")
    server = serving().Process(target=_serve, args=(address,))
    server.start()
    Finalize(None, server.kill, exitpriority=10)  # before multiprocessing waits for it, in a forked process too
    while not Path(address).exists():
        if server.exitcode is not None:
            raise RuntimeError("the server of warm_python() did not start")
        time.sleep(0.01)
    command = folder / "python"
    command.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    command.chmod(0o755)
    return str(command)


def _serve(address: str) -> None:
    if IMPORTS not in sys.modules:
        raise RuntimeError(f"{IMPORTS} was not imported by the server")
    gc.freeze()
    tests = multiprocessing.parent_process()  # whose end nothing else tells: the fork server lives on while this process does
    assert tests is not None
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that mind a call
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    listener.settimeout(2)
    while tests.is_alive():
        with contextlib.suppress(TimeoutError):
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    _mind(client)
                finally:
                    os._exit(1)
            client.close()


def _mind(client: socket.socket) -> None:
    """Start what one client asks for, and report how it ends."""
    client.setblocking(True)
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += client.recv(1 << 20)
    command, flags, words, environ, folder = json.loads(content.decode("utf-8", "surrogateescape"))
    process = multiprocessing.get_context("fork").Process(target=_become, args=(command, flags, words, environ, folder, streams))
    process.start()
    for stream in streams:
        os.close(stream)
    client.sendall(f"{process.pid}\n".encode())
    while process.exitcode is None:
        if client in wait([client, process.sentinel]) and not client.recv(1):
            process.kill()
    client.sendall(f"{process.exitcode}\n".encode())
    os._exit(0)


def _become(command: str, flags: Sequence[str], words: Sequence[str], environ: dict[str, str], folder: str, streams: Sequence[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=True, write_through="-u" in flags)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    gc.unfreeze()
    sys.executable = command
    kind = words[0] if words[0] in ("-m", "-c") else "script"
    named, arguments = (words[0], words[1:]) if kind == "script" else (words[1], words[2:])
    program = Path(named).resolve() if kind == "script" else None
    if program is None or ROOT not in program.parents:
        _forget_the_project()
    own = [] if "-P" in flags else [str(program.parent) if program else "" if kind == "-c" else os.getcwd()]
    paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*own, *paths, *(path for path in sys.path if path != str(ROOT))]
    if any((Path(path) / "sitecustomize.py").exists() for path in paths):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    sys.argv = [named if kind == "script" else kind, *arguments]
    if kind == "script":
        runpy.run_path(named, run_name="__main__")
    elif kind == "-m":
        sys.modules.pop(named, None)
        runpy.run_module(named, run_name="__main__", alter_sys=True)
    else:
        exec(compile(named, "<string>", "exec"), {"__name__": "__main__"})


def _forget_the_project() -> None:
    """A program that is not the project's must not find it loaded."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PROJECT]:
        del sys.modules[name]
