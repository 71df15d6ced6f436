"""What each family hands over opens in a fresh interpreter that does not know this project, and predicts what was trained."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.choices import known_axes
from helpers.config.options import AdapterOptions
from helpers.families import tiny
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.protocols import Trainable
from tests.families.conftest import CPU, PEFT_ALONE, PIXELS, Tried, family_name, open_family

LAYOUTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.kohya.safetensors")
KOHYA = ("sd1", "sd2", "sdxl", "sdxl_refiner")  # miniatures whose LoRA is written in kohya's layout too
SCHEDULED: dict[str, dict[str, object]] = {"diffusion": {"timestep_spacing": "trailing"}, "flow": {"shift": 2.0}}
MINIATURES = [name for name in tiny.MINIATURES if name not in PEFT_ALONE]
TIMESTEPS = torch.tensor([0, 150, 600, 999])
# What plain diffusers makes of a folder for each miniature: the pipeline itself, the pipeline with each LoRA file, without one.
ELSEWHERE = """
import importlib.util, json, pathlib, sys
assert importlib.util.find_spec("helpers") is None, "this interpreter must not know the project"
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

def opened(folder):
    index = json.loads((pathlib.Path(folder) / "model_index.json").read_text())
    absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))

def difference(pipeline, question, answer):
    more = {}
    if "time_ids" in question:
        more = {"added_cond_kwargs": {"text_embeds": question["pooled"], "time_ids": question["time_ids"]}}
    with torch.no_grad():
        if hasattr(pipeline, "transformer"):
            text = question["prompt_embeds"], question["pooled"]
            given = pipeline.transformer(question["noisy"], *text, question["timesteps"], return_dict=False)[0]
        else:
            noisy = question["noisy"]
            if "image" in question:
                noisy, more = torch.cat((noisy, question["image"]), dim=1), {"class_labels": question["image_noise_level"]}
            given = pipeline.unet(noisy, question["timesteps"], question["prompt_embeds"], **more).sample
    return (given[:, :question[answer].shape[1]] - question[answer]).abs().max().item()  # without a variance

found = {}
for place in map(pathlib.Path, sys.argv[1:]):
    question = load_file(place / "question.safetensors")
    pipeline = opened(place / "full" / "pipeline")
    seen = {"pipeline": difference(pipeline, question, "answer of full"), "scheduler": dict(pipeline.scheduler.config)}
    pipeline.set_progress_bar_config(disable=True)
    more = {"image": torch.zeros(1, 3, 64, 64), "strength": 1.0} if "Img2Img" in type(pipeline).__name__ else {"width": 64, "height": 64}
    if "SuperResolution" in type(pipeline).__name__:
        more["image"] = torch.zeros(1, 3, 16, 16)
    images = pipeline("a red circle", num_inference_steps=2, output_type="pt", **more).images
    seen["image"] = [list(images.shape), images.isfinite().all().item()]
    pipeline = opened((place / "model").read_text())
    seen["none"] = difference(pipeline, question, "answer of lora")
    for name in (path.name for path in (place / "lora").iterdir()):
        pipeline.load_lora_weights(place / "lora", weight_name=name)
        seen[name] = difference(pipeline, question, "answer of lora")
        pipeline.unload_lora_weights()
    found[place.name] = seen
print(json.dumps(found))
"""


def changed(trainable: Trainable, spread: float) -> Trainable:
    """With weights as training might leave them."""
    generator = torch.Generator().manual_seed(0)
    trainable.put({n: w.detach() + spread * torch.randn(w.shape, generator=generator) for n, w in trainable.parameters.items()})
    return trainable


def everywhere(tried: Tried) -> tuple[str, ...]:
    """Every layer that can have an adapter."""
    layers = tried.family.load(torch.float32).denoiser.named_modules()
    return tuple(name for name, layer in layers if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear))


def hand_over(tried: Tried, place: Path) -> None:
    """Export a full fine-tune and a LoRA on every layer, with an alpha that is not the rank, and what the live networks answer."""
    batch = tried.batch()
    conditioning = tried.family.conditioning(batch, CPU)

    def answer(trainable: Trainable) -> torch.Tensor:
        with torch.no_grad():
            return tried.family.predict(trainable.denoiser.eval(), batch.latents, TIMESTEPS, conditioning)

    full = FullFineTune(AdapterOptions(), tried.family)
    trained = changed(full.attach(tried.family.load(torch.float32)), 0.02)
    schedule = {**tried.family.scheduler_config, **SCHEDULED[tried.family.facts.objective]}
    sampler = "ddpm" if tried.miniature in PIXELS else "euler"
    full.export(trained, place / "full", {**schedule, "_class_name": tried.objective().samplers[sampler]}, None)
    options = dataclasses.replace(AdapterOptions(), lora_rank=4, lora_alpha=8.0, lora_targets=everywhere(tried))
    lora = Lora(options, tried.family)
    adapted = changed(lora.attach(tried.family.load(torch.float32)), 0.05)
    lora.export(adapted, place / "lora", {}, None)
    question = {"noisy": batch.latents, "timesteps": TIMESTEPS, **conditioning}
    answers = {"answer of full": answer(trained), "answer of lora": answer(adapted)}
    save_file({name: tensor.contiguous() for name, tensor in {**question, **answers}.items()}, place / "question.safetensors")
    (place / "model").write_text(str(tried.folder))


@pytest.fixture(scope="session")
def handed_over(miniature: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each miniature with what `hand_over` writes."""
    root = tmp_path_factory.mktemp("handed over")
    for name in MINIATURES:
        for kind in ("full", "lora"):
            (root / name / kind).mkdir(parents=True)
        folder = miniature(name)
        hand_over(Tried(name, folder, open_family(family_name(name), folder, root / "cache")), root / name)
    return root


@pytest.fixture(scope="session")
def elsewhere(handed_over: Path) -> dict[str, dict[str, Any]]:
    """What one fresh interpreter, offline, finds for each miniature."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *(str(handed_over / name) for name in MINIATURES)]
    done = subprocess.run(command, cwd=handed_over, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_a_pipeline_opens_elsewhere_with_the_weights_and_makes_a_picture(name: str, elsewhere: dict[str, dict[str, Any]]) -> None:
    seen = elsewhere[name]
    assert seen["pipeline"] < 1e-5
    assert SCHEDULED[known_axes().families[family_name(name)].objective].items() <= seen["scheduler"].items()
    assert seen["image"] == [[1, 3, 64, 64], True]
    assert seen["scheduler"].get("variance_type", "fixed_small") == "fixed_small"


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_every_layout_of_a_lora_opens_elsewhere_and_predicts_the_same(name: str, elsewhere: dict[str, dict[str, Any]]) -> None:
    """A LoRA that does nothing fails the same comparison."""
    seen = elsewhere[name]
    assert all(seen[layout] < 1e-5 for layout in (LAYOUTS if name in KOHYA else LAYOUTS[:1])), seen
    assert seen["none"] > 0.01


KOHYA_NAMES = {
    "sd1": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    "sd2": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
    "sdxl": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    "sdxl_refiner": "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
}
DESCRIBED = {
    "sd1": ("stable-diffusion-v1/lora", "sd_v1", "64x64"),
    "sd2": ("stable-diffusion-v2-768-v/lora", "sd_v2_v", "64x64"),
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "64x64"),
    "sdxl_refiner": ("stable-diffusion-xl-v1-refiner/lora", "sdxl_refiner_v1-0", "64x64"),
}


@pytest.mark.parametrize("name", KOHYA)
def test_the_kohya_layout_has_the_names_that_its_readers_know_and_says_what_it_is_for(name: str, handed_over: Path) -> None:
    path = handed_over / name / "lora" / LAYOUTS[1]
    tensors = load_file(path)
    assert all(f"{KOHYA_NAMES[name]}.{part}" in tensors for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = [metadata[key] for key in ("modelspec.architecture", "ss_base_model_version", "modelspec.resolution")]
    assert tuple(told) == DESCRIBED[name]
