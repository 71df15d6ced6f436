"""That a family is one file and one line is shown by adding one that way: it trains at once, with every method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.read import read_config
from helpers.families import FAMILIES
from tests.config.effects.lab import USUAL
from tests.data.toys import picture
from tests.harness import run_here


@pytest.mark.parametrize(("method", "made"), [("full", "pipeline/unet"), ("lora", "pytorch_lora_weights.safetensors")])
def test_a_family_of_one_file_and_one_line_trains(method: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES.places, "toy", "tests.families.toy:Toy")  # the one line
    monkeypatch.chdir(tmp_path)
    for index in range(4):
        picture(tmp_path / "images" / f"picture_{index}.png", index, (64, 64), "")
    (tmp_path / "data.json").write_text(json.dumps([{"id": "pictures", "instance_data_dir": "images"}]))
    flags = [*USUAL, f"--model_type={method}", "--lora_targets=conv1", "--lora_alpha=16", "--output_dir=out"]
    config = dataclasses.replace(read_config(flags, {}, known_axes()), family_name="toy")  # a released one is named by --model_family
    printed = run_here(config).printed
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and max(row["timestep"] for row in rows) < 50
    assert (tmp_path / "out" / made).exists()
    assert "\ntraining: Toy" in printed
    assert printed.count("a toy of one convolution") == 1
