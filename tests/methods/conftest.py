"""A miniature SDXL as a family, and a process that knows nothing of this project."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.config.options import CacheOptions, ModelOptions
from helpers.families.miniatures.sdxl import write_sdxl
from helpers.families.sdxl import SDXL
from tests.warm_python import warm_python

# What the network is asked: two noisy latents with their conditioning.
QUESTION = {
    "noisy": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    "timesteps": torch.tensor([10, 900]),
    "prompt_embeds": torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(2)),
    "pooled": torch.randn(2, 32, generator=torch.Generator().manual_seed(3)),
    "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [128, 96, 8, 0, 64, 64]]),
}

PREAMBLE = """
import importlib.util, sys
assert importlib.util.find_spec("helpers") is None, "this interpreter must not know the project"
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
question = load_file(sys.argv[1])
def answer(unet):
    added = {"text_embeds": question["pooled"], "time_ids": question["time_ids"]}
    with torch.no_grad():
        return unet(question["noisy"], question["timesteps"], question["prompt_embeds"], added_cond_kwargs=added).sample
def difference(unet):
    return (answer(unet) - question["answer"]).abs().max().item()
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture
def family(model: Path, tmp_path: Path) -> SDXL:
    options = dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model))
    return SDXL(options, dataclasses.replace(CacheOptions(), cache_dir=tmp_path / "cache"))


def ask(family: SDXL, denoiser: Any) -> torch.Tensor:
    """The live network's answer to QUESTION."""
    conditioning = {name: QUESTION[name] for name in ("prompt_embeds", "pooled", "time_ids")}
    with torch.no_grad():
        return family.predict(denoiser.eval(), QUESTION["noisy"], QUESTION["timesteps"], conditioning)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[[str, torch.Tensor], str]:
    """Run code offline in a process that does not find the project; `difference(unet)` there compares with the answer given.

    tests/families/test_exports.py opens what is exported in a fresh interpreter.
    """

    def run(code: str, answer: torch.Tensor) -> str:
        save_file({**QUESTION, "answer": answer}, tmp_path / "question.safetensors")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
        command = [warm_python(), "-c", PREAMBLE + textwrap.dedent(code), str(tmp_path / "question.safetensors")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
