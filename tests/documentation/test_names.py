"""Every flag, variable and file that a page names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.config.options import OPTIONS
from helpers.config.read import KNOWN_VARIABLES
from tests.documentation.pages import ROOT, Page
from toolkit.datasets import class_images
from toolkit.inference import experts

GUIDES = [
    "README.md",
    "INSTALL.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "documentation/QUICKSTART.md",
    "documentation/QUICKSTART_SD2.md",
    "documentation/QUICKSTART_SD3.md",
    "documentation/REFINER.md",
    "documentation/LORA.md",
    "documentation/DREAMBOOTH.md",
    "documentation/MIXTURE_OF_EXPERTS.md",
    "documentation/SIGMA.md",
    "documentation/HUNYUAN_DIT.md",
    "documentation/DEEPFLOYD.md",
    "documentation/DATALOADER.md",
    "documentation/OPTIMIZERS.md",
    "documentation/TEXT_ENCODER.md",
    "documentation/OBJECTIVES.md",
    "documentation/MEMORY.md",
    "documentation/ARCHITECTURE.md",
]
# Variables that are read before the env file is: by the wrappers and the set-up.
OF_THE_SET_UP = {"SIMPLETUNER_TORCH_BACKEND", "SIMPLETUNER_PYTHON", "PYTHON", "ENV_FILE"}
OF_AWS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"}
OF_OTHER_PROGRAMS = {
    "accelerate launch": {"--config_file", "--machine_rank", "--main_process_ip", "--main_process_port"},
    "uv": {"--torch-backend"},
    "hf": {"--repo-type"},
    "tensorboard": {"--logdir"},
    "ubuntu.sh": {"--detect", "--test"},
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
    assert (assigned | named) - KNOWN_VARIABLES - OF_THE_SET_UP - OF_AWS == set()


@pytest.mark.parametrize("name", GUIDES)
def test_scripts_and_sources_that_are_named_exist(name: str) -> None:
    named = {span for span in Page.named(name).spans() if re.fullmatch(r"[\w./-]+\.(py|sh|example|toml)", span)}
    named -= {"sdxl-env.sh", "sd21-env.sh", "sd2x-env.sh", "sd3-env.sh", "env.sh"}  # the user's own
    missing = [path for path in named if not (ROOT / path).exists() and not list((ROOT / "helpers").rglob(Path(path).name))]
    assert missing == []


def test_commands_of_the_pages_are_scripts_that_can_be_started() -> None:
    for name in GUIDES:
        for block in Page.named(name).blocks("bash"):
            for script in re.findall(r"(?:^|\s)(?:bash |\./)([\w/-]+\.sh)", block.text):
                assert (ROOT / script).stat().st_mode & 0o111, script
