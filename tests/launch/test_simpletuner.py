"""`./simpletuner`: its list, its commands, and what it says to a name that is none, from a copy that was never set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.commands import COMMANDS, main


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A fresh clone: every file that is kept in git, and no .venv."""
    root = tmp_path_factory.mktemp("clones") / "a fresh clone"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "simpletuner", "ubuntu.sh", "pyproject.toml", "constraints", "helpers", "toolkit"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in filter(lambda each: (repository / each).is_file(), names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, root / name)
    return root


def simpletuner(clone: Path, *arguments: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Typed in `folder`, with the Python of these tests unless `variables` choose."""
    environ = {name: value for name, value in os.environ.items() if name not in ("SIMPLETUNER_PYTHON", "PYTHONPATH")}
    environ |= variables or {"SIMPLETUNER_PYTHON": sys.executable}
    return subprocess.run([str(clone / "simpletuner"), *arguments], cwd=folder or clone, env=environ, capture_output=True, text=True)


def test_it_lists_its_commands_with_a_line_each(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = simpletuner(clone)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--help", "-h"):
        assert main([flag]) == 0 and capsys.readouterr().out == done.stdout
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert lines == {name: command.summary for name, command in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_by_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([name, "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr()
    assert said.err == ""
    usage, *rest = said.out.splitlines()
    assert usage.startswith(f"usage: ./simpletuner {name} ")
    assert any(line.startswith(f"    ./simpletuner {name}") for line in rest), "no example"


def test_a_misspelt_command_is_answered_with_the_nearest(clone: Path) -> None:
    done = simpletuner(clone, "class_image", "--number", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: ./simpletuner has no command 'class_image' (did you mean class-images?); without one it lists them.\n"


def test_arguments_and_exit_code_are_the_commands_own_and_paths_are_of_the_callers_folder(clone: Path, tmp_path: Path) -> None:
    """Through a link, too, and where a folder of the caller's is named like a library."""
    for name in ("argparse", "helpers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the caller folder was searched')")
    (tmp_path / "a run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "link").symlink_to(clone / "simpletuner")
    environ = {**os.environ, "SIMPLETUNER_PYTHON": sys.executable}
    done = subprocess.run(["./link", "checkpoints", "list", "a run"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "checkpoints in a run: 1\n" in done.stdout, done.stderr
    assert simpletuner(clone, "checkpoints", "verify", "a run", folder=tmp_path).returncode == 1
    assert simpletuner(clone, "checkpoints", "list", "no run", folder=tmp_path).returncode == 2


def test_the_miniature_command_writes_a_model_of_the_family_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["miniature", "sd1", str(tmp_path / "a model"), "--seed=3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a model'}\n"
    assert (tmp_path / "a model" / "model_index.json").is_file()


def test_it_sets_up_first(clone: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/bash\n[[ $1 == --version ]] && echo "Python 3.9.2" && exit; exit 1\n')
    old.chmod(0o755)
    done = simpletuner(clone, PYTHON=str(old))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ubuntu.sh: Python 3.11 or newer is needed")
