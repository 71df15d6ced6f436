"""The page on DreamBooth, followed from the pictures of the class to a picture of the subject."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.documentation.conftest import in_two_steps, new_reader
from tests.documentation.pages import Page

PAGE = Page.named("documentation/DREAMBOOTH.md")


@pytest.mark.slow
def test_the_page_leads_to_a_lora_that_was_held_to_its_class(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/sks")
    assert "/home/user/training/sks/" in PAGE.section("1. ").block("text")
    command = PAGE.section("2. ").block("bash").replace("--number 200", "--number 4").strip()
    reader.type(f"{command} --size 64 --steps 2")
    assert len(list((reader.home / "training" / "class_dog").glob("*.png"))) == 4

    datasets = reader.home / "training" / "multidatabackend_dreambooth.json"
    assert f"`/home/user/training/{datasets.name}`" in PAGE.text
    datasets.write_text(reader.own(PAGE.section("3. ").block("json")), encoding="utf-8")
    prompts = reader.home / "training" / "prompts.json"
    assert f"`/home/user/training/{prompts.name}`" in PAGE.text
    prompts.write_text(PAGE.section("4. ").block("json5"), encoding="utf-8")
    copy, settings = (block.text for block in PAGE.section("4. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    train = PAGE.section("5. ").block("bash").strip() + " --record_samples --max_train_steps=3 --train_batch_size=1 --report_to=none"
    said = reader.type(train)
    shown = PAGE.section("5. ").block("text").strip()
    assert "finished   3 steps" in said and shown in said
    output = reader.home / "training" / "models"
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert {row["caption"] for row in rows if row["dataset"] == "sks"} == {"a photo of sks dog"}
    assert {row["caption"] for row in rows if row["dataset"] == "class"} == {"a photo of a dog"}
    for name in json.loads(prompts.read_text()):
        assert list((output / "validation_images").glob(f"step_3_{name}_*.png")), name

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(in_two_steps(reader.own(PAGE.section("6. ").block("python"))), names)
    assert names["pipeline"].unet.peft_config, "no adapter was loaded"
    assert Path("rex.png").stat().st_size > 0
