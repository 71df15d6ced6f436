"""The page on LoRA and its relatives: every line of it is accepted, and the sample opens what a run hands over."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.choices import known_axes
from helpers.config.options import OPTIONS, AdapterOptions, CacheOptions, ModelOptions
from helpers.config.read import read_config
from helpers.families.miniatures.sdxl import write_sdxl
from helpers.families.sdxl import SDXL
from helpers.methods.lycoris import Lycoris
from tests.documentation.pages import Page

PAGE = Page.named("documentation/LORA.md")
REQUIRED = ("--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json")


@pytest.fixture
def accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Read flags as a run would, with a dataset there, and two LoRAs of rank 8."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "mine", "instance_data_dir": "images"}]))
    for name in ("first", "training-adapter"):
        save_file({"unet.a.to_q.lora_A.weight": torch.zeros(8, 4)}, tmp_path / f"{name}.safetensors")
    return lambda flags: read_config([*REQUIRED, *flags], {}, known_axes())


def test_every_line_is_accepted_and_nothing_in_it_does_nothing(accepted: Any) -> None:
    lines = [line for block in PAGE.blocks("bash") for line in block.text.splitlines()]
    assert len(lines) >= 7
    for line in lines:
        _, *flags = shlex.split(line.replace("/home/user/loras/", "").replace("/home/user/", ""))
        assert accepted(flags).notes == ()


def test_what_the_table_says_chooses_a_method_each(accepted: Any) -> None:
    [_, *rows] = next(PAGE.tables())
    chosen = []
    for _, say, _ in rows:
        flags = re.findall(r"--[\w=]+", say)
        config = accepted([*(["--model_type=lora"] if "--model_type" not in say else []), *flags])
        chosen.append((config.method_name, config.adapter.lora_algorithm, config.adapter.use_dora))
    assert len(set(chosen)) == len(rows) == 7


def test_every_start_that_can_be_chosen_is_described() -> None:
    [_, *rows] = [table for table in PAGE.tables()][1]
    described = {span for row in rows for span in re.findall(r"`(\w+)`", row[0])}
    assert described == set(OPTIONS["lora_init_type"].choices) - set(OPTIONS["lora_init_type"].unavailable_choices)


@pytest.mark.slow
def test_the_sample_opens_what_was_trained(tmp_path: Path) -> None:
    model = write_sdxl(tmp_path / "model")
    options = dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model))
    family = SDXL(options, dataclasses.replace(CacheOptions(), cache_dir=tmp_path / "cache"))
    method = Lycoris(dataclasses.replace(AdapterOptions(), lora_algorithm="lokr", lora_rank=2), family)
    trainable = method.attach(family.load(torch.float32))
    method.export(trainable, tmp_path, {}, None)
    sample = PAGE.block("python").replace("stabilityai/stable-diffusion-xl-base-1.0", str(model))
    names: dict[str, Any] = {}
    exec(sample.replace("/home/user/training/models", str(tmp_path)), names)
    assert len(names["network"].loras) == len({name.rpartition(".lycoris.")[0] for name in trainable.parameters})
