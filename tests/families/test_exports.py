"""What each family exports opens in a fresh interpreter that does not know this project, and predicts what was trained."""

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
from safetensors.torch import save_file

from helpers.choices import known_axes
from helpers.config.options import AdapterOptions
from helpers.families.tiny import MINIATURES
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.protocols import Trainable
from tests.families.conftest import CPU, EXPECTED, PEFT_ALONE, Tried, family_name, open_family

DIFFUSERS, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.kohya.safetensors"
PEFT = "pytorch_lora_weights.peft"
SCHEDULED: dict[str, dict[str, object]] = {"diffusion": {"timestep_spacing": "trailing"}, "flow": {"shift": 2.0}}
TIMESTEPS = torch.tensor([0, 150, 600, 999])
# What plain diffusers makes of a folder for each miniature: the pipeline, the pipeline with each LoRA file, and without one. The network
# gets just what it got in the project, and must answer as it did there.
ELSEWHERE = """
import importlib.util, inspect, json, os, pathlib, sys
assert importlib.util.find_spec("helpers") is None, "this interpreter must not know the project"
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

def opened(folder):
    index = json.loads((pathlib.Path(folder) / "model_index.json").read_text())
    return DiffusionPipeline.from_pretrained(folder, **{name: None for name, value in index.items() if value == [None, None]})

def restored(value, tensors):
    if isinstance(value, list):
        return [restored(item, tensors) for item in value]
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {name: restored(item, tensors) for name, item in value.items()}
    return value

def difference(pipeline, place, kind):
    tensors = load_file(place / "tensors.safetensors")
    call = restored(json.loads((place / "call.json").read_text()), tensors)
    network = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    with torch.no_grad():
        given = network(*call["positional"], **call["named"]).sample
    return (given - tensors["answer of " + kind]).abs().max().item()

def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    size = 16 if "noise_level" in known else 64  # of the image that a pipeline starts from
    usual = {"image": torch.zeros(1, 3, size, size), "strength": 1.0, "width": 64, "height": 64, "use_resolution_binning": False}
    if "image" in known and "noise_level" not in known:
        usual = {name: usual[name] for name in ("image", "strength")}
    return pipeline("a red circle", num_inference_steps=2, output_type="pt", **{n: v for n, v in usual.items() if n in known}).images

found = {}
for place in map(pathlib.Path, sys.argv[1:]):
    pipeline = opened(place / "full" / "pipeline")
    seen = {"pipeline": difference(pipeline, place, "full"), "scheduler": dict(pipeline.scheduler.config)}
    images = picture(pipeline)
    seen["image"] = [list(images.shape), images.isfinite().all().item()]
    pipeline = opened((place / "model").read_text())
    seen["none"] = difference(pipeline, place, "lora")
    for path in (place / "lora").iterdir():
        if path.is_dir():
            os.chdir(path.parent)
            said = {}
            exec((path / "README.md").read_text().split("```python")[1].split("```")[0], said)
            seen[path.name] = difference(said["pipeline"], place, "lora")
        elif hasattr(pipeline, "load_lora_weights") and not (hasattr(pipeline, "transformer") and ".kohya." in path.name):
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
            seen[path.name] = difference(pipeline, place, "lora")
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


class Recorder:
    """The call of a network by its family, and the network's answers: JSON in which tensors are named, and the tensors."""

    def __init__(self, tried: Tried) -> None:
        self.tried, self.batch = tried, tried.batch()
        self.call: Any = None
        self.tensors: dict[str, torch.Tensor] = {}

    def answer(self, kind: str, denoiser: Any) -> None:
        """Record what a network answers, and what it gets, which is the same for every kind."""

        def record(network: Any, positional: Any, named: Any) -> None:
            self.call = self._named({"positional": list(positional), "named": dict(named)}, "call")

        def keep(network: Any, positional: Any, answer: Any) -> None:
            self.tensors[f"answer of {kind}"] = answer.sample.clone()

        family = self.tried.family
        hooks = (denoiser.register_forward_pre_hook(record, with_kwargs=True), denoiser.register_forward_hook(keep))
        with torch.no_grad():
            family.predict(denoiser.eval(), self.batch.latents, TIMESTEPS, family.conditioning(self.batch, CPU))
        for hook in hooks:
            hook.remove()

    def write(self, place: Path) -> None:
        (place / "call.json").write_text(json.dumps(self.call))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, place / "tensors.safetensors")

    def _named(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value.clone()
            return {"tensor": name}
        if isinstance(value, dict):
            return {key: self._named(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._named(item, f"{name}.{index}") for index, item in enumerate(value)]
        return value


def export(tried: Tried, place: Path) -> None:
    """Export a full fine-tune and a LoRA on every layer, with an alpha that is not the rank, and record what the live networks answer."""
    recorder = Recorder(tried)
    full = FullFineTune(AdapterOptions(), tried.family)
    trained = changed(full.attach(tried.family.load(torch.float32)), 0.02)
    schedule = {**tried.family.scheduler_config, **SCHEDULED[tried.family.facts.objective]}
    sampler = tried.family.facts.defaults.get("validation_noise_scheduler", "euler")
    full.export(trained, place / "full", {**schedule, "_class_name": tried.objective().samplers[str(sampler)]}, None)
    recorder.answer("full", trained.denoiser)
    options = dataclasses.replace(AdapterOptions(), lora_rank=4, lora_alpha=8.0, lora_targets=everywhere(tried))
    lora = Lora(options, tried.family)
    adapted = changed(lora.attach(tried.family.load(torch.float32)), 0.05)
    lora.export(adapted, place / "lora", {}, None)
    recorder.answer("lora", adapted.denoiser)
    recorder.write(place)
    (place / "model").write_text(str(tried.folder))


@pytest.fixture(scope="session")
def exported(miniature: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each miniature with what `export` writes."""
    root = tmp_path_factory.mktemp("exported")
    for name in MINIATURES:
        for kind in ("full", "lora"):
            (root / name / kind).mkdir(parents=True)
        folder = miniature(name)
        export(Tried(name, folder, open_family(family_name(name), folder, root / "cache")), root / name)
    return root


@pytest.fixture(scope="session")
def elsewhere(exported: Path) -> dict[str, dict[str, Any]]:
    """What one fresh interpreter, offline, finds for each miniature."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *(str(exported / name) for name in MINIATURES)]
    done = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_a_pipeline_opens_elsewhere_with_the_weights_and_makes_an_image(name: str, elsewhere: dict[str, dict[str, Any]]) -> None:
    seen = elsewhere[name]
    assert seen["pipeline"] < 1e-5
    assert SCHEDULED[known_axes().families[family_name(name)].objective].items() <= seen["scheduler"].items()
    assert seen["image"] == [[1, 3, 64, 64], True]
    assert not str(seen["scheduler"].get("variance_type")).startswith("learned")


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_every_layout_of_a_lora_opens_elsewhere_and_predicts_the_same(
    name: str, exported: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    """A LoRA that does nothing fails the same comparison.

    Of transformers diffusers reads no kohya file, or one of published widths alone: the tests of their names compare those.
    """
    seen = elsewhere[name]
    unet = (exported / name / "full" / "pipeline" / "unet").exists()
    layouts = [DIFFUSERS if name not in PEFT_ALONE else PEFT, *([KOHYA_FILE] if EXPECTED[name].kohya and unet else [])]
    assert {path for path in seen if path.startswith("pytorch_lora_weights")} == set(layouts)
    assert all(seen[layout] < 1e-5 for layout in layouts), seen
    assert seen["none"] > 0.01


@pytest.mark.parametrize("name", MINIATURES)
def test_a_lora_is_written_in_every_layout_that_has_readers(name: str, exported: Path) -> None:
    written = {DIFFUSERS, *([KOHYA_FILE] if EXPECTED[name].kohya else []), *([PEFT] if name in PEFT_ALONE else [])}
    assert {path.name for path in (exported / name / "lora").iterdir()} == written
