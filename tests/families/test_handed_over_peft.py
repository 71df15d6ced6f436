"""As test_handed_over.py, of families whose pipelines have no loader for LoRA files: peft opens the folder that is written for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.conftest import PEFT_ALONE, Tried, family_name, open_family
from tests.families.test_handed_over import hand_over

ELSEWHERE = """
import importlib.util, json, os, pathlib, sys
assert importlib.util.find_spec("helpers") is None, "this interpreter must not know the project"
import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from safetensors.torch import load_file

def difference(pipeline, question, answer):
    named = {"timestep": question["timesteps"].float(), "encoder_hidden_states": question["prompt_embeds"]}
    if "prompt_embeds_2" in question:
        named |= {name: question[name] for name in ("image_meta_size", "style") if name in question}
        named["text_embedding_mask"] = question["prompt_embeds_mask"]
        named["encoder_hidden_states_t5"] = question["prompt_embeds_2"]
        named["text_embedding_mask_t5"] = question["prompt_attention_mask_2"]
        named["image_rotary_emb"] = get_2d_rotary_pos_embed(16, ((0, 0), (32, 32)), (4, 4), output_type="pt")
    else:
        named["added_cond_kwargs"] = {name: question.get(name) for name in ("resolution", "aspect_ratio")}
        named["encoder_attention_mask"] = question["prompt_embeds_mask"]
    with torch.no_grad():
        given = pipeline.transformer(question["noisy"], **named).sample.chunk(2, dim=1)[0]
    return (given - question[answer]).abs().max().item()

found = {}
for place in map(pathlib.Path, sys.argv[1:]):
    question = load_file(place / "question.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(place / "full" / "pipeline")
    seen = {"pipeline": difference(pipeline, question, "answer of full"), "spacing": pipeline.scheduler.config.timestep_spacing}
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": 64, "height": 64, "use_resolution_binning": False}
    images = pipeline("a red circle", num_inference_steps=2, output_type="pt", **size).images
    seen["image"] = [list(images.shape), images.isfinite().all().item()]
    pipeline = DiffusionPipeline.from_pretrained((place / "model").read_text())
    seen["none"] = difference(pipeline, question, "answer of lora")
    card = (place / "lora" / "pytorch_lora_weights.peft" / "README.md").read_text()
    os.chdir(place / "lora")
    said = {}
    exec(card.split("```python")[1].split("```")[0], said)
    pipeline = said["pipeline"]
    seen["lora"] = difference(pipeline, question, "answer of lora")
    found[place.name] = seen
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(miniature: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one fresh interpreter, offline, finds for each miniature in what was handed over."""
    root = tmp_path_factory.mktemp("handed over")
    for name in PEFT_ALONE:
        for kind in ("full", "lora"):
            (root / name / kind).mkdir(parents=True)
        folder = miniature(name)
        hand_over(Tried(name, folder, open_family(family_name(name), folder, root / "cache")), root / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *(str(root / name) for name in PEFT_ALONE)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT_ALONE)
def test_a_pipeline_opens_elsewhere_with_the_weights_and_makes_a_picture(name: str, elsewhere: dict[str, dict[str, Any]]) -> None:
    seen = elsewhere[name]
    assert seen["pipeline"] < 1e-5
    assert seen["spacing"] == "trailing"
    assert seen["image"] == [[1, 3, 64, 64], True]


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT_ALONE)
def test_the_code_of_a_loras_card_opens_it_elsewhere_and_it_predicts_the_same(name: str, elsewhere: dict[str, dict[str, Any]]) -> None:
    """A LoRA that does nothing fails the same comparison."""
    assert elsewhere[name]["lora"] < 1e-5
    assert elsewhere[name]["none"] > 0.01
