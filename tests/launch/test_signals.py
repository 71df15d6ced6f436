"""Signals to the wrapper, and the code it ends with, on one process and on two under accelerate.

Saves take a few seconds here; SIMPLETUNER_TEST_LONG=1 makes them 40 s, longer than the 30 s that accelerate would wait by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE_S = 200.0  # for what takes moments, on a machine that is busy with other things
SAVE_S = 40.0 if os.environ.get("SIMPLETUNER_TEST_LONG") else 1.0
SETTINGS = "MODEL_NAME='m'\nDATALOADER_CONFIG='data.json'\nTRAINING_NUM_PROCESSES='{processes}'\n"


@pytest.fixture
def training(sandbox: Any) -> Callable[..., subprocess.Popen[str]]:
    """Start the `saver` trainer on so many processes."""
    sandbox.trainer("saver")

    def start(processes: int, listening: bool = True, **variables: str) -> subprocess.Popen[str]:
        (sandbox.folder / "sdxl-env.sh").write_text(SETTINGS.format(processes=processes))
        process: subprocess.Popen[str] = sandbox.start(**variables)
        for rank in range(processes):
            sandbox.noted("listening" if listening else "begun", rank)
        return process

    return start


def ended(process: subprocess.Popen[str], within_s: float = PATIENCE_S) -> int:
    process.communicate(timeout=within_s)
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number", "send"),
    [
        (1, signal.SIGTERM, os.kill),
        (1, signal.SIGUSR1, os.kill),
        (1, signal.SIGINT, os.killpg),
        (2, signal.SIGTERM, os.kill),
        (2, signal.SIGHUP, os.kill),
        (2, signal.SIGINT, os.killpg),  # the ranks get it twice: from the terminal, and from the launcher
    ],
)
def test_a_signal_lets_every_rank_save_and_ends_with_75_without_a_traceback(
    sandbox: Any, training: Callable[..., Any], processes: int, number: int, send: Callable[[int, int], None]
) -> None:
    wrapper = training(processes, STANDIN_SAVE_S=str(SAVE_S))
    send(wrapper.pid, number)
    _, told = wrapper.communicate(timeout=SAVE_S + PATIENCE_S)
    assert wrapper.returncode == 75, told
    assert "Traceback" not in told and "ChildFailedError" not in told
    for rank in range(processes):
        sandbox.noted("saved", rank, within_s=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_leaves_at_once_with_130(
    sandbox: Any, training: Callable[..., Any], gone: Callable[[int, float], None], processes: int
) -> None:
    wrapper = training(processes, STANDIN_SAVE_S="600")
    os.kill(wrapper.pid, signal.SIGTERM)
    pids = [sandbox.noted("stopping", rank) for rank in range(processes)]
    os.kill(wrapper.pid, signal.SIGTERM)
    assert ended(wrapper) == 130  # long before the save is done
    for pid in pids:
        gone(pid, PATIENCE_S)


@pytest.mark.slow
@pytest.mark.parametrize("end, code", [("0=0,1=0", 0), ("1=2", 2), ("1=kill", 1)])
def test_the_code_is_the_trainers_and_a_failed_rank_takes_the_others_along(
    sandbox: Any, training: Callable[..., Any], gone: Callable[[int, float], None], end: str, code: int
) -> None:
    for name in ("torch", "accelerate", "helpers", "data"):  # modules of the caller's folder hide no library
        (sandbox.folder / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    wrapper = training(2, STANDIN_END=end)
    pids = [sandbox.noted("begun", rank) for rank in (0, 1)]
    assert ended(wrapper) == code
    for pid in pids:
        gone(pid, PATIENCE_S)


@pytest.mark.slow
@pytest.mark.parametrize("listening", [True, False], ids=["in training", "while starting"])
def test_ranks_do_not_outlive_a_launcher_that_is_killed(
    sandbox: Any, training: Callable[..., Any], gone: Callable[[int, float], None], listening: bool
) -> None:
    wrapper = training(2, listening, STANDIN_LATE_S="0" if listening else "600")
    pids = [sandbox.noted("begun", rank) for rank in (0, 1)]
    os.kill(wrapper.pid, signal.SIGKILL)
    for pid in pids:
        gone(pid, PATIENCE_S)


@pytest.mark.slow
def test_a_signal_that_comes_while_the_ranks_are_starting_reaches_them_later(sandbox: Any, training: Callable[..., Any]) -> None:
    wrapper = training(2, listening=False, STANDIN_LATE_S="2")
    os.kill(wrapper.pid, signal.SIGTERM)
    assert ended(wrapper) == 75
    sandbox.noted("saved", 1, within_s=0)


@pytest.mark.slow
def test_two_signals_while_the_ranks_are_starting_end_it_at_once(
    sandbox: Any, training: Callable[..., Any], gone: Callable[[int, float], None]
) -> None:
    wrapper = training(2, listening=False, STANDIN_LATE_S="600")
    pids = [sandbox.noted("begun", rank) for rank in (0, 1)]
    os.kill(wrapper.pid, signal.SIGINT)
    time.sleep(2)  # two that come before the process looks are one to it
    os.kill(wrapper.pid, signal.SIGINT)
    assert ended(wrapper) == 130
    for pid in pids:
        gone(pid, PATIENCE_S)


@pytest.mark.slow
def test_accelerate_by_hand_works_too(sandbox: Any) -> None:
    sandbox.trainer("saver")
    flags = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, str(sandbox.root / "train.py")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "STANDIN_NOTES": str(sandbox.notes), "STANDIN_END": "0=0,1=0"},
        cwd=sandbox.root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {note.name for note in sandbox.notes.iterdir()} >= {"listening-0", "listening-1"}
