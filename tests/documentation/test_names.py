"""Every flag, variable and file that a page names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import library_settings, threads
from helpers.choices import known_axes
from helpers.config.read import known_variables
from tests.documentation.pages import ROOT, Page
from toolkit.datasets import class_images
from toolkit.inference import experts

OPTIONS = known_axes().options

# These three name, on purpose, what is not there: abbreviations, settings of another release, the files a reader is to write.
OF_ABSENT_THINGS = {"OPTIONS.md", "documentation/MIGRATION.md", "documentation/ADDING_A_MODEL.md"}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "documentation").glob("*.md")]
GUIDES = sorted({str(page.relative_to(ROOT)) for page in PAGES} - OF_ABSENT_THINGS)
OF_THE_USER = {"sd2x-env.sh", "env.sh", *(path.name.removesuffix(".example") for path in ROOT.glob("*-env.sh.example"))}
# Variables that are read before the env file is: by the wrappers and the set-up.
OF_THE_SET_UP = {"SIMPLETUNER_TORCH_BACKEND", "SIMPLETUNER_PYTHON", "PYTHON", "ENV_FILE"}
OF_TORCH = {*threads.SETTLE_IT, *library_settings.COUNT, "WORLD_SIZE"}
OF_AWS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"}
OF_OTHER_PROGRAMS = {
    "accelerate launch": {"--config_file", "--machine_rank", "--main_process_ip", "--main_process_port"},
    "uv": {"--torch-backend"},
    "hf": {"--repo-type"},
    "tensorboard": {"--logdir"},
    "ubuntu.sh": {"--detect", "--test"},
    "cache gc": {"--delete"},
    "benchmarks": {"--rounds", "--profile", "--threads", "--folder"},
    "experts": {flag for action in experts.parser()._actions for flag in action.option_strings},
    "class_images": {flag for action in class_images.parser()._actions for flag in action.option_strings},
}


@pytest.mark.parametrize("name", GUIDES)
def test_flags_are_options(name: str) -> None:
    flags = {flag for code in Page.named(name).code() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    known = {item.flag for item in OPTIONS.values()} | {"--help"}
    assert flags - known - set().union(*OF_OTHER_PROGRAMS.values()) == set()


def test_flags_of_the_set_up_exist() -> None:
    script = (ROOT / "ubuntu.sh").read_text(encoding="utf-8")
    assert all(flag in script for flag in OF_OTHER_PROGRAMS["ubuntu.sh"])


@pytest.mark.parametrize("name", GUIDES)
def test_variables_are_known(name: str) -> None:
    named = {span for span in Page.named(name).spans() if re.fullmatch(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+", span)}
    assigned = {variable for code in Page.named(name).code() for variable in re.findall(r"(?<![\w$-])([A-Z][A-Z0-9_]+)=", code)}
    unknown = (assigned | named) - known_variables(known_axes().options) - OF_THE_SET_UP - OF_TORCH - OF_AWS
    assert {variable for variable in unknown if not library_settings.remove_library_settings({variable: "8"})} == set()


@pytest.mark.parametrize("name", GUIDES)
def test_scripts_and_sources_that_are_named_exist(name: str) -> None:
    named = {span for span in Page.named(name).spans() if re.fullmatch(r"[\w./-]+\.(py|sh|example|toml)", span)}
    missing = [path for path in named - OF_THE_USER if not (ROOT / path).exists() and not list((ROOT / "helpers").rglob(Path(path).name))]
    assert missing == []


def test_commands_of_the_pages_are_scripts_that_can_be_started() -> None:
    for name in GUIDES:
        for block in Page.named(name).blocks("bash"):
            for script in re.findall(r"(?:^|\s)(?:bash |\./)([\w/-]+\.sh)", block.text):
                if script not in OF_THE_USER:
                    assert (ROOT / script).stat().st_mode & 0o111, script
