"""The page on optimisers: every name is one, and every example is a setting that can be used."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.choices import known_axes
from helpers.config.optimizers import OPTIMIZERS
from helpers.config.read import known_variables, read_config
from helpers.training.optimizers import create_optimizer
from tests.documentation.pages import Page

OPTIONS = known_axes().options

PAGE = Page.named("documentation/OPTIMIZERS.md")
EXAMPLES = PAGE.blocks("bash")


def test_the_table_holds_every_optimiser_that_has_a_name_of_its_own() -> None:
    [table] = PAGE.tables()
    assert {row[0].strip(" `") for row in table[1:] if not set(row[0]) <= set("-: ")} == set(OPTIMIZERS)


def test_flags_variables_and_names_exist() -> None:
    spans = PAGE.spans()
    flags = {flag for span in spans for flag in re.findall(r"--[a-z]\w+", span)}
    assert flags <= {item.flag for item in OPTIONS.values()}
    assert {name for span in spans for name in re.findall(r"\b[A-Z][A-Z0-9_]{4,}\b", span)} - {"NAME", "PYTHONPATH"} <= known_variables(
        known_axes().options
    )


def test_every_class_on_the_page_is_one() -> None:
    classes = {span for span in PAGE.spans() if re.fullmatch(r"[a-z][\w.]*:[A-Z]\w*", span)}
    assert len(classes) >= 3
    for text in classes:
        module, _, name = text.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), torch.optim.Optimizer)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_can_be_trained_with(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "pictures", "instance_data_dir": "images"}]))
    monkeypatch.chdir(tmp_path)
    lines = shlex.split(EXAMPLES[number].text, comments=True)
    variables = dict(line.split("=", 1) for line in lines)
    flags = ["--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json"]
    config = read_config(flags, variables, known_axes())
    assert config.notes == ()
    assert config.optimizer.optimizer == variables["OPTIMIZER"]
    create_optimizer(config.optimizer, {"w": nn.Parameter(torch.ones(2, 2))}, config.schedule.learning_rate)
