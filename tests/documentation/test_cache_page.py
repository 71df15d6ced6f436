"""The commands of the page on the cache do what it says, one after the other, on the caches of the quick start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.documentation.conftest import Followed
from tests.documentation.pages import ROOT, Page

COMMANDS = [line for block in Page.named("documentation/CACHE.md").blocks("bash") for line in block.text.splitlines()]
SAYS = {
    "verify": "all well",
    "stats": "records   3, ",
    "why": "is current: the next start uses it as it is",
    "export": "coffee.png: ",
    "gc": "0 records, 0.00 MB",
}


@pytest.mark.slow
def test_the_commands_of_the_page_work_as_written(quick_start: Followed) -> None:
    assert {line.split()[3] for line in COMMANDS} == set(SAYS)
    for line in COMMANDS:
        command = quick_start.reader.own(line).replace(".venv/bin/python", sys.executable)
        ended = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert SAYS[line.split()[3]] in ended.stdout, line
    assert (quick_start.reader.home / "coffee.png").stat().st_size > 0
