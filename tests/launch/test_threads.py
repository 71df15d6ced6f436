"""How threads on the CPU wait: briefly, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.threads import SETTLE_IT, wait_briefly


def test_openmp_takes_the_setting_of_a_process_that_is_running_already() -> None:
    """Its own account, printed when torch loads it: the trainer is that late, for it reads the options first."""
    environ = {name: value for name, value in os.environ.items() if name not in SETTLE_IT} | {"OMP_DISPLAY_ENV": "verbose"}
    program = "import os; from helpers.threads import wait_briefly; wait_briefly(os.environ); import torch"
    told = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True).stderr
    if "GOMP_" not in told:
        pytest.skip("this PyTorch brings another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '10000'" in told


@pytest.mark.parametrize("name", SETTLE_IT)
def test_whoever_settles_how_threads_wait_is_left_alone(name: str) -> None:
    environ = {name: "1"}
    wait_briefly(environ)
    assert environ == {name: "1"}
