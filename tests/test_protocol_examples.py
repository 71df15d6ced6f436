"""The examples in the docstrings of the protocols are complete: each is taken from its docstring and used by the code that it is for."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import protocols, registry
from helpers.config.facts import Facts
from helpers.config.options import CacheOptions, ModelOptions, ObjectiveOptions
from helpers.data import ports
from helpers.data.base.draws import StepDraws
from helpers.data.base.workers import Workers
from helpers.data.batches import Batch
from helpers.data.prepare import prepare_data
from helpers.errors import ConfigError
from helpers.objectives.diffusion import Diffusion
from helpers.protocols import Corrupted, Parts, Reporter, StepResult, Trainable
from helpers.storage.tensors import save_tensors
from tests.data.toys import dataset, pictures, settings
from tests.families.toy import Toy


def example(documented: object, **names: Any) -> dict[str, Any]:
    """What the code of a docstring defines: it follows a colon and an empty line, and is indented."""
    _, _, text = (getattr(documented, "__doc__", None) or "").partition(":\n\n")
    code = []
    for line in text.splitlines():
        if line and len(line) - len(line.lstrip()) < len(text) - len(text.lstrip()):
            break
        code.append(line)
    exec(textwrap.dedent("\n".join(code)), names)
    return names


def test_data_is_prepared_for_the_family_of_the_example(tmp_path: Path) -> None:
    family = example(ports, torch=torch, contextlib=contextlib, LatentSpec=ports.LatentSpec)["Tiny"]()
    images = dataset(pictures(tmp_path / "images", 4), tmp_path / "caches")
    data = prepare_data([images], settings(tmp_path / "out"), family, Workers(), Reporter())
    with contextlib.closing(data.steps(0, 1)) as steps:
        [batch] = next(iter(steps))
    assert batch.latents.shape[1] == 3
    assert sorted(batch.latents.shape[2:]) == [16, 24]  # of images of 64 x 96 pixels
    assert batch.text["length"].flatten().tolist() == [float(len(caption)) for caption in batch.captions]


def test_the_training_step_of_the_example_has_a_gradient() -> None:
    batch = Batch(
        latents=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        text={"length": torch.ones(2, 1)},
        captions=("a", "b"),
        samples=(),
        geometry=(),
        loss_weight=torch.ones(2),
        draws=StepDraws(seed=1, step=0, places=(0, 1), step_samples=2),
        epoch=0,
    )
    names: dict[str, Any] = {"torch": torch, "batch": batch, "device": torch.device("cpu"), "FAMILIES": {"sdxl": Toy}}
    names |= {"model_options": ModelOptions(), "cache_options": CacheOptions()}
    done = example(protocols.ModelFamily, objective=Diffusion(ObjectiveOptions(), Toy.scheduler_config), **names)
    done["loss"].backward()
    assert done["loss"] > 0 and all(parameter.grad is not None for parameter in done["denoiser"].conv_in.parameters())


def test_the_objective_of_the_example_adds_noise_and_learns_it() -> None:
    objective = example(protocols.Objective, torch=torch, Facts=Facts, Corrupted=Corrupted)["HalfNoise"](None, {})
    latents = torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    corrupted = objective.corrupt(latents, StepDraws(seed=1, step=0, places=(0, 1, 2, 3), step_samples=4))
    assert corrupted.noisy.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(objective.loss(corrupted.target, corrupted), torch.zeros(4))
    assert objective.loss(corrupted.target + 2, corrupted).tolist() == pytest.approx([4.0] * 4, rel=1e-5)


def test_the_method_of_the_example_trains_and_keeps_one_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    names = {"torch": torch, "Facts": Facts, "ConfigError": ConfigError, "Trainable": Trainable}
    method = example(protocols.TrainingMethod, save_tensors=save_tensors, load_file=load_file, **names)["FirstLayer"](None, None)
    parts = Toy(ModelOptions(), CacheOptions()).load(torch.float32)
    method.check(parts)
    trainable = method.attach(parts)
    moving = {name for name, parameter in parts.denoiser.named_parameters() if parameter.requires_grad}
    assert moving == set(trainable.parameters) == {"conv_in.weight", "conv_in.bias"}
    [written] = method.save(trainable, tmp_path)
    assert written.is_file()
    read = method.read(trainable, tmp_path)
    assert all(torch.equal(read[name], parameter) for name, parameter in trainable.parameters.items())
    with pytest.raises(ConfigError):
        method.check(Parts(nn.Linear(1, 1), "unet"))


def test_the_reporter_of_the_example_prints_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = example(protocols.Reporter, Reporter=Reporter)["PrintLoss"]()
    result = StepResult(step=3, epoch=0, loss=0.25, learning_rate=1e-4, grad_norm=1.0, seconds=1.0, data_seconds=0.0, samples=4)
    reporter.stepped(result)
    assert reporter.progress("work", 10, "images") is None
    assert capsys.readouterr().out == "3 0.25\n"


def test_the_registry_of_the_example_loads_what_is_chosen() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    names = example(registry.Registry, Registry=registry.Registry, Optimizer=torch.optim.Optimizer, parameters=parameters)
    assert isinstance(names["optimizer"], torch.optim.AdamW)
    assert list(names["OPTIMIZERS"]) == ["adamw"] and "sgd" not in names["OPTIMIZERS"]
