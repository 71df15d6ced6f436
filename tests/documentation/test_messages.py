"""What the tables "you see, do" quote is what the program says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.config.options import CheckpointOptions
from helpers.config.resume import Changes
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, scan
from helpers.data.plan.targets import ResolutionRule
from helpers.errors import UserError
from helpers.storage.local import LocalSource
from helpers.training.checkpoints import Checkpointer
from helpers.training.lock import lock_folder
from helpers.training.runtime import resolve_precision
from helpers.training.state import TrainState
from helpers.training.steps import stop_if_diverged
from tests.documentation.pages import ROOT, Page


def quoted() -> list[str]:
    """Messages in the first column of a table about what one sees: inline code of several words."""
    readme, quickstart = Page.named("README.md"), Page.named("documentation/QUICKSTART.md")
    tables = [*readme.section("Troubleshooting").tables(), *quickstart.section("What you see").tables()]
    return [span for rows in tables for row in rows[1:] for span in re.findall(r"`([^`]+)`", row[0]) if " " in span]


def pattern(message: str) -> str:
    """ "..." stands for anything and a number for any number."""
    return re.sub(r"\d+", r"\\d+", re.escape(message).replace(re.escape("..."), ".*"))


def refusal(act: Callable[[], object], *kinds: type[Exception]) -> str:
    with pytest.raises(kinds or UserError) as caught:
        act()
    return str(caught.value)


def wrong_settings(folder: Path) -> str:
    """All mistakes of one start: a flag, the tenth line of the env file, a folder that is not there."""
    (folder / "data.json").write_text(json.dumps([{"id": "mine", "instance_data_dir": "nowhere"}]))
    (folder / "sdxl-env.sh").write_text("\n" * 9 + "LR_SHEDULE='constant'\n")
    command = [sys.executable, str(ROOT / "helpers" / "launch.py"), "--learning_rat=1", "--data_backend_config=data.json"]
    environ = {**os.environ, "SIMPLETUNER_ENV_FILE": "sdxl-env.sh"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True).stderr


def pictures_without_captions(folder: Path) -> str:
    (folder / "pictures").mkdir()
    for name in ("beach.jpg", "sofa.jpg"):
        Image.new("RGB", (64, 64)).save(folder / "pictures" / name)
    rules = DatasetRules("mine", ResolutionRule(), CaptionRule("textfile"))
    with Catalogue(folder / "catalogue.sqlite") as catalogue:
        return refusal(lambda: scan(LocalSource(folder / "pictures"), rules, catalogue))


@pytest.fixture
def said(tmp_path: Path) -> str:
    lock = lock_folder(tmp_path, "--output_dir")
    wrapper = (ROOT / "helpers" / "launch.sh").read_text(encoding="utf-8").replace("$name", "sdxl-env.sh")
    diverged = TrainState(seed=1, step=4, skipped_in_a_row=4)
    messages = [
        wrong_settings(tmp_path),
        pictures_without_captions(tmp_path),
        refusal(lambda: lock_folder(tmp_path, "--output_dir")),
        refusal(lambda: Changes(["lora_rank was 16 and is now 8"]).refuse("checkpoint-150")),
        resolve_precision("bf16", False, torch.device("cpu"))[1] or "",
        refusal(lambda: stop_if_diverged(diverged, "no", [], Checkpointer(CheckpointOptions(), tmp_path)), Exception),
        wrapper,
    ]
    lock.close()
    return "\n".join(messages)


def test_every_message_that_is_quoted_is_said(said: str) -> None:
    assert len(quoted()) >= 8
    assert [message for message in quoted() if not re.search(pattern(message), said)] == []
