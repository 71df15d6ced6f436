"""Trackers without a login are refused at once, not after hours of caching."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.config import Config
from helpers.config.tracker_login import missing_login

Read = Callable[..., Config]
Refuse = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_API_KEY": "key"},
        {"WANDB_IDENTITY_TOKEN_FILE": "token"},
        {"WANDB_ANONYMOUS": "allow"},
        {"WANDB_MODE": "offline"},
        {"WANDB_MODE": "disabled"},
        {"WANDB_DISABLED": "true"},
    ],
    ids=str,
)
def test_wandb_needs_a_key_unless_it_stays_offline(variables: dict[str, str], home: Path) -> None:
    assert missing_login("wandb", {"HOME": str(home), **variables}) is None
    missing = missing_login("wandb", {"HOME": str(home), "WANDB_MODE": "online"})
    assert missing and "no API key for api.wandb.ai" in missing and "wandb login" in missing


def test_a_key_of_wandb_login_counts_for_its_server_alone(home: Path) -> None:
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    (home / ".netrc").chmod(0o600)
    assert missing_login("wandb", {"HOME": str(home)}) is None
    other = missing_login("wandb", {"HOME": str(home), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert other and "no API key for wandb.example.org" in other
    (home / ".netrc").write_text("machine")  # damaged
    assert missing_login("wandb", {"HOME": str(home)})


def test_settings_of_wandb_may_say_offline(home: Path) -> None:
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert missing_login("wandb", {"HOME": str(home)}) is None
    (home / "wandb").rename(home / "elsewhere")
    assert missing_login("wandb", {"HOME": str(home)})
    assert missing_login("wandb", {"HOME": str(home), "WANDB_CONFIG_DIR": str(home / "elsewhere")}) is None


def test_comet_needs_a_key(home: Path) -> None:
    missing = missing_login("comet", {"HOME": str(home)})
    assert missing and "COMET_API_KEY" in missing
    assert missing_login("comet", {"HOME": str(home), "COMET_API_KEY": "key"}) is None
    (home / ".comet.config").write_text("[comet]\napi_key=key\n")
    assert missing_login("comet", {"HOME": str(home)}) is None


def test_others_need_none(home: Path) -> None:
    assert missing_login("tensorboard", {"HOME": str(home)}) is None and missing_login("none", {}) is None


def test_a_run_is_refused_before_anything_else(read: Read, refuse: Refuse, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    said = refuse("--report_to=wandb", HOME=str(home))
    assert said.startswith("--report_to: wandb has no API key")
    assert read("--report_to=wandb", HOME=str(home), WANDB_API_KEY="key").reporting.report_to == ("wandb",)
    assert read("--report_to=wandb", "--dataset_report", HOME=str(home)).run.dataset_report
