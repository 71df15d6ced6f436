"""The page on adding a model is done: its code goes into a copy of the repository, whose tests and trainer then know one family more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.documentation.pages import ROOT, Page
from tests.warm_python import warm_python

PAGE = Page.named("documentation/ADDING_A_MODEL.md")
PIECES = re.findall(r"^`([\w./]+)`([^\n]*):\n\n```(python|diff)\n(.*?)^```$", PAGE.text, re.MULTILINE | re.DOTALL)
COPIED = ("helpers", "tests", "toolkit")  # the folders that the page writes to, and the programs that import them
SPARED = "tests/families/test_exports.py"  # it goes through all families: SIMPLETUNER_TEST_LONG=1 runs it here too


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the pieces of the page in it."""
    folder = tmp_path_factory.mktemp("copy")
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix in (".py", ".sh") or path.name == "simpletuner":
            shutil.copy(path, folder)  # scripts look for the rest beside themselves
        elif not path.name.startswith(".") and path.name != "output":
            (folder / path.name).symlink_to(path)
    (folder / "OPTIONS.md").unlink()
    (folder / "OPTIONS.md").touch()
    for name, where, language, text in PIECES:
        put_in(folder / name, language, textwrap.indent(text, "    ") if "in the class" in where else text)
    return folder


def put_in(file: Path, language: str, text: str) -> None:
    """Python is added to the end of a file; of a diff, the lines that were are found, once, and replaced by those that are."""
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    if language == "python":
        new = f"{old}{'' if not old else SPACE[text[:1].isspace()]}{text}"
    else:
        lines = text.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert old.count(before) == 1, f"{file.name} has no such lines, or more than once:\n{before}"
        new = old.replace(before, after)
    file.write_text(new, encoding="utf-8")


SPACE = {True: "\n", False: "\n\n"}  # before a method, and before a class or function


def type_there(copy: Path, commands: str, home: Path) -> str:
    commands = commands.replace("/home/user", str(home)).replace(".venv/bin/python", warm_python())
    environ = {**os.environ, "SIMPLETUNER_PYTHON": warm_python(), "ENV_FILE": os.devnull, "PYTHONPATH": str(copy)}
    ended = subprocess.run(
        ["bash", "-ec", commands], cwd=copy, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_the_page_writes_the_files_that_it_names() -> None:
    assert len(PIECES) == len(PAGE.blocks("python", "diff")) >= 8


@pytest.mark.slow
def test_the_new_family_passes_the_tests_of_every_family_and_its_own(copy: Path, tmp_path: Path) -> None:
    document, families, architecture = PAGE.section("5. ").blocks("bash")[0].text.splitlines()
    long = os.environ.get("SIMPLETUNER_TEST_LONG")
    said = type_there(copy, "\n".join([document, families if long else f"{families} --ignore {SPARED}", architecture]), tmp_path)
    found = [int(number) for number in re.findall(r"^(\d+) passed", said, re.MULTILINE)]
    assert len(found) == 2 and found[0] >= (16 if long else 12)
    assert "`--auraflow`" in (copy / "OPTIONS.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_new_family_trains_through_its_wrapper(copy: Path, tmp_path: Path) -> None:
    said = type_there(copy, PAGE.section("5. ").blocks("bash")[1].text, tmp_path)
    assert "training   AuraFlow · LoRA rank 16" in said and "finished   2 steps" in said
    assert (tmp_path / "auraflow" / "pytorch_lora_weights.safetensors").is_file()
