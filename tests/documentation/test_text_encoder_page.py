"""The page on training text encoders: its commands are accepted, its tables are true, and its sample opens what is handed over."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.choices import known_axes
from helpers.config.options import AdapterOptions, TextEncoderOptions
from helpers.config.read import read_config
from helpers.errors import ConfigError
from helpers.families.miniatures.sd import write_sd2
from helpers.methods.lora import Lora
from helpers.methods.text_encoders import add_text_encoders
from helpers.protocols import can_train_text_encoders
from tests.documentation.pages import Page
from tests.families.conftest import open_family

OPTIONS = known_axes().options

PAGE = Page.named("documentation/TEXT_ENCODER.md")
FAMILIES = {"./train_sdxl.sh": "sdxl", "./train_sd2x.sh": "sd2x"}
REQUIRED = ("--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json")


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "mine", "instance_data_dir": "images"}]))
    return lambda family, *flags: read_config([*REQUIRED, f"--model_family={family}", *flags], {}, known_axes())


def test_every_command_is_accepted_and_nothing_in_it_does_nothing(read: Any) -> None:
    lines = PAGE.block("bash").splitlines()
    assert len(lines) == 4
    for line in lines:
        wrapper, *flags = shlex.split(line)
        assert read(FAMILIES[wrapper], *flags).notes == ()


def test_what_the_page_calls_refused_is_refused_at_once_and_the_rest_is_not(read: Any) -> None:
    refused = []
    families = OPTIONS["model_family"].choices
    for family in families:
        for kind in ("full", "lora"):
            try:
                read(family, f"--model_type={kind}", "--train_text_encoder")
            except ConfigError as error:
                assert any("--train_text_encoder" in problem for problem in error.problems)
                refused.append((family, kind))
    accepted = {(family, kind) for family in families for kind in ("full", "lora")} - set(refused)
    assert accepted == {("sd2x", "full"), ("sd2x", "lora"), ("sdxl", "lora")}
    with pytest.raises(ConfigError, match="cannot be trained here"):  # the base model turns out to be one
        read("sdxl", "--model_type=lora", "--train_text_encoder").of_family(known_axes().families["sdxl_refiner"])
    for flag in ("--lora_algorithm=lokr", "--lora_algorithm=loha"):
        with pytest.raises(ConfigError, match="--train_text_encoder"):
            read("sdxl", "--model_type=lora", "--train_text_encoder", flag)
    with pytest.raises(ConfigError, match="bitfit"):
        read("sd2x", "--model_type=full", "--train_text_encoder", "--use_bitfit")


def test_every_strategy_is_described() -> None:
    [_, [_, *rows]] = list(PAGE.tables())
    assert {row[0].strip("`") for row in rows} == set(OPTIONS["freeze_encoder_strategy"].choices)


@pytest.mark.slow
def test_the_sample_opens_a_lora_with_its_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_sd2(tmp_path / "model")
    family = open_family("sd2x", model, tmp_path / "cache")
    parts = family.load(torch.float32)
    assert can_train_text_encoders(family)
    add_text_encoders(parts, family, TextEncoderOptions(), torch.float32, freezes=False)
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=2), family)
    method.export(method.attach(parts), tmp_path, {}, None)
    monkeypatch.chdir(tmp_path)
    sample = PAGE.block("python").replace("stabilityai/stable-diffusion-2-1", str(model))
    names: dict[str, Any] = {}
    exec(sample.replace("/home/user/training/models", str(tmp_path)).replace("steps=20", "steps=1"), names)
    assert names["pipeline"].unet.peft_config and names["pipeline"].text_encoder.peft_config
    assert (tmp_path / "rex.png").stat().st_size > 0
