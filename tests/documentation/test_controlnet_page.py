"""The page on ControlNet, followed step by step on a miniature and three photographs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.documentation.conftest import new_reader
from tests.documentation.pages import Page

PAGE = Page.named("documentation/CONTROLNET.md")


@pytest.mark.slow
def test_the_page_makes_conditions_and_trains_a_controlnet_that_its_sample_loads(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/images")
    monkeypatch.chdir(tmp_path)
    exec(reader.own(PAGE.section("1. ").block("python")), {})
    (reader.home / "training" / "multidatabackend.json").write_text(reader.own(PAGE.section("1. ").block("json")))
    copy, settings = (block.text for block in PAGE.section("2. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    said = reader.type(PAGE.section("3. ").block("bash"))
    assert "finished   2 steps" in said and "edges: 3 files = 3 used + 0 left out" in said
    names: dict[str, Any] = {}
    use = reader.own(PAGE.section("4. ").block("python")).replace("guidance_scale", "num_inference_steps=2, guidance_scale")
    exec(use, names)
    trained = names["pipeline"].controlnet
    assert isinstance(trained, diffusers.ControlNetModel) and trained.dtype == torch.bfloat16
    assert (tmp_path / "cat.png").stat().st_size > 0


def test_the_classes_in_the_table_are_those_of_diffusers() -> None:
    [_, *rows] = [table for table in PAGE.tables()][-1]
    for _, controlnet, pipeline in rows:
        assert hasattr(diffusers, controlnet.strip("`"))
        kind, argument = (word.strip("`,=") for word in pipeline.split())
        assert argument in getattr(diffusers, kind).__call__.__annotations__
