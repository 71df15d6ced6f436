"""What asks a run to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.training.stopping import StopRequest


def wait_until_asked(stop: StopRequest) -> None:
    limit = time.monotonic() + 10
    while not stop.asked and time.monotonic() < limit:
        time.sleep(0.01)


def test_time_that_is_up_asks_once(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest().after(0.05)
    assert not stop.asked
    wait_until_asked(stop)
    assert stop.asked and stop.by == ""
    assert "--max_train_seconds=0.05 reached" in capfd.readouterr().err


def test_a_run_that_stops_by_itself_may_be_asked_once_more_before_it_leaves_at_once() -> None:
    """Nobody who presses Ctrl-C while the run is saving meant to lose what it saves."""
    code = """
import os, signal, sys, time
from helpers.training.stopping import StopRequest
stop = StopRequest().listen().after(0.01)
while not stop.asked: time.sleep(0.01)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print("saved", stop.by, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert ended.returncode == 130 and ended.stdout == f"saved {signal.SIGTERM.name}\n"
