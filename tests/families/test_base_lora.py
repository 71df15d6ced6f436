"""--base_lora: the weights of the base model as with the LoRA of a file, while an adapter is trained beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.config.options import AdapterOptions
from helpers.errors import ConfigError
from helpers.methods.base_lora import BaseLora
from helpers.methods.lora import Lora
from tests.families.conftest import CPU, Tried, family_name, open_family
from tests.families.test_quantized_base import answer, off

ONE_OF_EACH_KIND = ("sd2", "sdxl", "sd3", "flux", "pixart_sigma", "hunyuan_dit", "deepfloyd_1")


def written(tried: Tried, folder: Path, **options: Any) -> tuple[list[Path], torch.Tensor]:
    """The files of a LoRA, and the answer of the network with it."""
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=2, lora_alpha=8.0, lora_dropout=0.0, **options), tried.family)
    trainable = method.attach(tried.family.load(torch.float32))
    generator = torch.Generator().manual_seed(0)
    trainable.put({name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in trainable.parameters.items()})
    return [path for path in method.save(trainable, folder) if path.is_file()], answer(tried, trainable.denoiser)


@pytest.mark.parametrize("tried", ONE_OF_EACH_KIND, indirect=True)
def test_the_network_answers_as_with_the_lora_of_each_layout(tried: Tried, tmp_path: Path) -> None:
    targets = (*tried.family.lora_targets, "conv1") if tried.miniature == "sdxl" else ()
    files, expected = written(tried, tmp_path, lora_targets=targets)
    plain = answer(tried, tried.family.load(torch.float32).denoiser)
    assert off(plain, expected) > 0.01
    for path in files:
        network = tried.family.load(torch.float32).denoiser
        lora = BaseLora.read(path, tried.family)
        lora.check(tried.family.load(None).denoiser)
        lora.merge(network, CPU)
        assert off(answer(tried, network), expected) < 1e-5, path.name


@pytest.mark.parametrize("tried", ["sdxl"], indirect=True)
def test_a_file_that_is_no_lora_of_the_base_model_is_refused(tried: Tried, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            BaseLora.read(path, tried.family).check(tried.family.load(None).denoiser)
        return str(error.value)

    [plain, *_], _ = written(tried, tmp_path)
    flux = Tried("flux", miniature("flux"), open_family(family_name("flux"), miniature("flux"), tmp_path / "cache"))
    [other, *_], _ = written(flux, tmp_path / "flux")
    assert refused(other).startswith(f"--base_lora: {other} ")
    tensors = load_file(plain)
    first = min(tensors)
    shape = tensors[first].shape
    save_file({**tensors, first: torch.ones(shape[0], shape[1] + 8)}, tmp_path / "size.safetensors")
    assert f"size.safetensors changes a weight of 32 x {shape[1] + 8}, and this base model's is" in refused(tmp_path / "size.safetensors")
    save_file({f"unet.elsewhere.{end}": torch.ones(2, 2) for end in ("lora_A.weight", "lora_B.weight")}, tmp_path / "layer.safetensors")
    assert "has a layer elsewhere, which this base model does not have" in refused(tmp_path / "layer.safetensors")
    [dora, *_], _ = written(tried, tmp_path / "dora", use_dora=True)
    assert "which is no matrix of a LoRA" in refused(dora)
