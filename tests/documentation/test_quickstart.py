"""What the README and the quick start tell people to do works as written."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.documentation.conftest import PHOTOGRAPHS, Followed, new_reader
from tests.documentation.pages import ROOT, Page

QUICKSTART = Page.named("documentation/QUICKSTART.md")
README = Page.named("README.md")


@pytest.mark.slow
def test_the_quick_start_trains_on_every_picture(quick_start: Followed, finished_report: dict[str, Any]) -> None:
    assert finished_report["found"] == finished_report["used"] == len(PHOTOGRAPHS)
    assert "finished   2 steps" in quick_start.said


@pytest.mark.slow
def test_a_run_speaks_in_the_words_that_the_quick_start_shows(quick_start: Followed) -> None:
    shown = QUICKSTART.section("4. ").block("text").splitlines()
    chapters = re.sub(r"\n {5,}", " ", quick_start.said)  # long ones go on indented
    for line in shown[1:]:  # the first speaks of a checkpoint, and this run is a new one
        start = re.escape(line.split()[0])
        [said] = [said for said in chapters.splitlines() if re.match(start, said) and "step " not in said[:20]]
        words = re.findall(r"[a-zA-Z]{4,}", re.sub(r"^\w+\s+\w+:", "", line))
        assert all(word in said for word in words if word != "photos"), (line, said)


@pytest.mark.slow
def test_a_run_leaves_the_files_that_the_readme_lists(quick_start: Followed) -> None:
    [_, *rows] = next(README.section("Output files").tables())
    named = {span.replace("<N>", "2") for row in rows for span in re.findall(r"`([^`]+)`", row[0])}
    # Of a full fine-tune, with --export_single_file or --record_samples, and of a network without kohya's layout.
    only_otherwise = {"pipeline/", "pipeline.safetensors", "samples.jsonl", "pytorch_lora_weights.peft/"}
    assert len(named) >= 10 and only_otherwise <= named
    assert [name for name in named - only_otherwise if not (quick_start.output / name).exists()] == []
    undocumented = {path.name for path in quick_start.output.iterdir() if not path.name.startswith(".")}
    assert undocumented - {name.partition("/")[0] for name in named} == set()


@pytest.mark.slow
def test_the_python_sample_loads_the_lora_and_makes_a_picture(
    quick_start: Followed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(quick_start.reader.own(QUICKSTART.section("7. ").block("python")), names)
    assert (tmp_path / "rex.png").stat().st_size > 0
    assert names["pipeline"].unet.peft_config, "no adapter was loaded"


@pytest.mark.slow
def test_the_report_has_the_fields_that_the_page_on_data_sets_explains(finished_report: dict[str, Any]) -> None:
    text = Page.named("documentation/DATALOADER.md").section("Files").text
    assert [field for field in finished_report if field != "id" and f"`{field}`" not in text] == []


# In place of the interpreter that a wrapper starts: judges the settings as the launcher does, and trains nothing.
JUDGE = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
from helpers.choices import known_axes
from helpers.config.read import read_config
config = read_config(sys.argv[2:], os.environ, known_axes())
print(config.datasets[0].instance_data_dir, config.run.output_dir, config.validation.validation_prompt, sep="|")
"""


def test_the_lines_for_ones_own_images_in_the_readme_are_accepted(models: Mapping[str, Path], tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    judge.write_text(JUDGE.format(python=sys.executable, root=str(ROOT)))
    judge.chmod(0o755)
    reader = dataclasses.replace(new_reader(tmp_path, models, "images"), python=str(judge))
    said = reader.type(README.section("Train on your own images").block("bash"))
    assert said.splitlines()[-1] == f"{reader.home}/images|output|a photo of my dog"
