"""The command of tests/warm_python.py behaves as `python` does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm_python import warm_python

ASKS = """
import importlib.util, os, sys
print(sys.argv, os.getcwd(), os.environ["ASKED"], sys.stdin.read(), importlib.util.find_spec("helpers"), "torch" in sys.modules)
sys.exit(7)
"""


def call(*words: str, folder: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), *words], cwd=folder, env={"ASKED": "ä"}, input=said, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def test_arguments_folder_environment_streams_and_exit_code_are_the_calls_own(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(ASKS, encoding="utf-8")
    for start, name in ((["-c", ASKS], "-c"), (["asks.py"], "asks.py")):
        done = call(*start, "a b", folder=tmp_path, said="heard")
        assert (done.returncode, done.stdout) == (7, f"['{name}', 'a b'] {tmp_path} ä heard None True\n"), done.stderr
    done = call("-c", "1 / 0", folder=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert call("-V", folder=tmp_path).stdout.split()[1] == sys.version.split()[0]  # what it does not understand


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_both_and_is_the_exit_code(number: signal.Signals, tmp_path: Path) -> None:
    code = "import signal, os, time; signal.signal(2, signal.SIG_DFL); print(os.getpid(), flush=True); time.sleep(60)"
    client = subprocess.Popen([warm_python(), "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    served = int(client.stdout.readline())
    client.send_signal(number)
    assert client.wait(20) == -number
    assert client.stdout.read() == ""  # its end: the process that was served has closed it, as a process that ends does
    end = time.monotonic() + 20
    while not ended(served):  # it is still being cleared away
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process: int) -> bool:
    try:
        return "zombie" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
