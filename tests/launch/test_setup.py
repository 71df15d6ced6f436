"""ubuntu.sh: which torch a machine gets, what it says when it cannot, and that starting it again costs nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest


@pytest.fixture
def fresh(tmp_path: Path, repository: Path) -> Path:
    """What ubuntu.sh needs of the repository, without a .venv."""
    root = tmp_path / "a fresh clone"
    root.mkdir()
    shutil.copytree(repository / "constraints", root / "constraints")
    for name in ("ubuntu.sh", "pyproject.toml"):
        shutil.copy(repository / name, root)
    return root


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools of mine"
    folder.mkdir()
    return folder


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def set_up(root: Path, *arguments: str, first: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.environ["PATH"] if first is None else f"{first}:{os.environ['PATH']}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SIMPLETUNER_")}
    return subprocess.run(
        ["bash", str(root / "ubuntu.sh"), *arguments], env={**environ, "PATH": path, **variables}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "tool, answer, backend",
    [
        ("nvidia-smi", "echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'", "cuda"),
        ("nvidia-smi", "echo 'NVIDIA-SMI has failed because there is no driver' >&2; exit 9", "cpu"),
        ("nvidia-smi", "echo 'No devices were found'; exit 6", "cpu"),
        ("rocminfo", "echo '  Name:  gfx1100'", "rocm"),
        ("rocminfo", "echo 'ROCk module is NOT loaded'; exit 1", "cpu"),
        ("uname", "echo Darwin", "default"),
    ],
)
def test_the_machine_is_recognized_by_its_drivers(fresh: Path, tools: Path, tool: str, answer: str, backend: str) -> None:
    for other in ("nvidia-smi", "rocminfo"):
        command(tools, other, "exit 1")
    command(tools, tool, answer)
    assert set_up(fresh, "--detect", first=tools).stdout == f"{backend}\n"


def test_the_user_may_choose_the_build(fresh: Path) -> None:
    assert set_up(fresh, "--detect", SIMPLETUNER_TORCH_BACKEND="cu126").stdout == "cu126\n"


def test_an_old_python_is_refused_in_a_sentence(fresh: Path, tools: Path) -> None:
    command(tools, "python3", '[[ $1 == --version ]] && echo "Python 3.9.2" && exit; exit 1')
    done = set_up(fresh, PYTHON=str(tools / "python3"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Python 3.11 or newer is needed" in done.stderr and "Python 3.9.2" in done.stderr
    assert not (fresh / ".venv").exists()


def test_a_python_without_the_venv_module_is_refused_with_the_remedy(fresh: Path, tools: Path) -> None:
    command(tools, "python3", "[[ $2 != *ensurepip* ]] || exit 1")
    done = set_up(fresh, PYTHON=str(tools / "python3"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "apt-get install python3-venv" in done.stderr


def test_a_misspelt_argument_sets_nothing_up(fresh: Path) -> None:
    assert set_up(fresh, "--tset").returncode == 2
    assert not (fresh / ".venv").exists()


def test_the_pins_hold_one_version_of_everything_asked_for(repository: Path) -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (repository / "constraints" / "pins.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert pins["torch"] == "2.13.0"  # without a local version: any build of it will do


@pytest.mark.slow
@pytest.mark.skipif("SIMPLETUNER_TEST_LONG" not in os.environ, reason="downloads everything, twice: SIMPLETUNER_TEST_LONG=1")
def test_a_set_up_that_is_killed_is_finished_by_the_next_and_the_one_after_takes_no_time(fresh: Path) -> None:
    quiet = subprocess.DEVNULL
    killed = subprocess.Popen(["bash", str(fresh / "ubuntu.sh")], stdout=quiet, stderr=quiet, start_new_session=True)
    time.sleep(12)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = set_up(fresh)
    assert done.returncode == 0, done.stderr
    program = "import diffusers, peft, accelerate, torch; print(torch.__version__.split('+')[0], torch.version.cuda or torch.version.hip)"
    told = subprocess.run([fresh / ".venv/bin/python", "-c", program], capture_output=True, text=True).stdout
    gpu = set_up(fresh, "--detect").stdout.strip() in ("cuda", "rocm")
    assert told.startswith("2.13.0 ") and told.endswith("None\n") is not gpu
    before = time.monotonic()
    assert set_up(fresh).returncode == 0
    assert time.monotonic() - before < 0.5
