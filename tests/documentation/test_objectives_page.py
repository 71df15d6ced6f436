"""The page on objectives: its tables hold every choice, and its examples are settings that can be trained with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.options import OPTIONS
from helpers.config.read import read_config
from helpers.families.miniatures.sdxl import SDXL_SCHEDULE
from helpers.objectives import OBJECTIVES
from helpers.objectives.weights import loss_weight
from tests.documentation.pages import Page

PAGE = Page.named("documentation/OBJECTIVES.md")
EXAMPLES = [block.text for block in PAGE.blocks("bash") if "simpletuner" not in block.text]
TABLES = {table[0][0].strip("` -"): table for table in PAGE.tables()}


@pytest.mark.parametrize("name", ["prediction_type", "weighting_scheme", "loss", "loss_weighting", "timestep_bias_strategy"])
def test_a_table_holds_every_choice(name: str) -> None:
    named = {row[0].partition(" ")[0].strip("`") for row in TABLES[name][1:]}
    assert named == set(OPTIONS[name].choices) - ({"none"} if name == "timestep_bias_strategy" else set())


@pytest.mark.parametrize("row", [row for row in TABLES["loss_weighting"][1:] if "none" not in row[0]], ids=lambda row: row[0].strip("`"))
def test_weights_are_those_that_the_page_says(row: list[str]) -> None:
    """The formulas of the table as they are written, for four ratios of signal to noise."""
    import torch

    for prediction, written in zip(("sample", "epsilon", "v_prediction"), row[1:4], strict=True):
        formula = written
        for said, means in ((" / (", "/("), ("√S", "S**0.5"), ("(S + γ) (S + 1)", "(S + γ)*(S + 1)"), ("S γ", "S*γ"), ("γ", "g")):
            formula = formula.replace(said, means)
        for snr in (0.1, 1.0, 5.0, 50.0):
            kept = torch.tensor(snr / (1 + snr), dtype=torch.float64)
            expected = eval(formula, {"min": min}, {"S": snr, "g": 4.0})
            assert loss_weight(row[0].strip("`"), kept, 4.0, prediction).item() == pytest.approx(expected, rel=1e-9), written


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_can_be_trained_with(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "pictures", "instance_data_dir": "images"}]))
    monkeypatch.chdir(tmp_path)
    variables = dict(line.split("=", 1) for line in shlex.split(EXAMPLES[number], comments=True))
    flags = ["--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json"]
    config = read_config(flags, variables, known_axes())
    assert config.notes == ()
    schedule = {"shift": 3.0} if config.objective_name == "flow" else SDXL_SCHEDULE
    objective = OBJECTIVES[config.objective_name](config.objective, schedule)
    assert objective.scheduler_config["shift" if config.objective_name == "flow" else "prediction_type"]


def test_the_scheduler_for_stable_diffusion_3_by_diffusion_is_the_one_that_is_trained() -> None:
    from diffusers import DDIMScheduler

    from helpers.families.sd3 import DIFFUSION_SCHEDULE

    names: dict[str, object] = {}
    exec(PAGE.block("python"), names)
    trained = DDIMScheduler.from_config({**DIFFUSION_SCHEDULE, "timestep_spacing": OPTIONS["inference_scheduler_timestep_spacing"].default})
    told, expected = ({key: value for key, value in made.config.items() if key[0] != "_"} for made in (names["scheduler"], trained))  # type: ignore[attr-defined]
    assert told == expected
