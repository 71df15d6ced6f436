"""BitFit moves the biases and nothing else, and hands over a whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.config.options import AdapterOptions
from helpers.errors import ConfigError
from helpers.families.sdxl import SDXL
from helpers.methods.bitfit import BitFit
from helpers.protocols import Parts, Trainable
from tests.methods.conftest import ask


def trained(family: SDXL) -> tuple[BitFit, Trainable]:
    method = BitFit(AdapterOptions(), family)
    trainable = method.attach(family.load(torch.float32))
    generator = torch.Generator().manual_seed(0)
    trainable.put({n: w.detach() + 0.05 * torch.randn(w.shape, generator=generator) for n, w in trainable.parameters.items()})
    return method, trainable


def test_what_moves_has_bias_in_its_name_and_all_of_it_does(family: SDXL) -> None:
    _, trainable = trained(family)
    moving = {name for name, parameter in trainable.denoiser.named_parameters() if parameter.requires_grad}
    assert moving == set(trainable.parameters) == {name for name, _ in trainable.denoiser.named_parameters() if "bias" in name}
    base = family.load(torch.float32).denoiser.state_dict()
    changed = {name for name, weights in trainable.denoiser.state_dict().items() if not torch.equal(weights, base[name])}
    assert changed == moving


def test_biases_are_kept_with_the_whole_network_and_read_back_to_the_bit(family: SDXL, tmp_path: Path) -> None:
    method, trainable = trained(family)
    [folder] = method.save(trainable, tmp_path)
    assert (folder / "config.json").is_file()
    stored = method.read(trainable, tmp_path)
    assert stored.keys() == trainable.parameters.keys()
    assert all(torch.equal(stored[name], weights) for name, weights in trainable.parameters.items())


def test_a_network_without_biases_is_refused(family: SDXL) -> None:
    with pytest.raises(ConfigError, match="this network has none"):
        BitFit(AdapterOptions(), family).attach(Parts(nn.Linear(2, 2, bias=False), "unet"))


def test_biases_are_float32_unless_the_optimiser_is_made_for_less(family: SDXL) -> None:
    method = BitFit(AdapterOptions(), family)
    assert method.default_optimizer("bf16") == "adamw"
    assert method.weights_dtype("bf16", "adamw") == torch.float32


@pytest.mark.slow
def test_the_pipeline_opens_in_diffusers_and_predicts_what_the_live_model_predicts(
    family: SDXL, model: Path, tmp_path: Path, elsewhere: Callable[[str, torch.Tensor], str]
) -> None:
    method, trainable = trained(family)
    average = {name: 0.5 * weights.detach() for name, weights in trainable.parameters.items()}
    assert [path.name for path in method.export(trainable, tmp_path, family.scheduler_config, None)] == ["pipeline"]
    said = elsewhere(
        f"""
        for folder in ({str(tmp_path / "pipeline")!r}, {str(model)!r}):
            print(difference(StableDiffusionXLPipeline.from_pretrained(folder).unet))
        """,
        ask(family, trainable.denoiser),
    )
    trained_model, base_model = map(float, said.split())
    assert trained_model < 1e-5
    assert base_model > 0.01
    assert [path.name for path in method.export(trainable, tmp_path, family.scheduler_config, average)] == ["pipeline", "unet_live"]
