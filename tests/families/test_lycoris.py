"""LoKr and LoHa of every family: the LyCORIS library opens the files beside the family's network, and that predicts as it did live."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file

from helpers.config.options import AdapterOptions
from helpers.methods.lycoris import Lycoris
from tests.families.conftest import CPU, Tried

TIMESTEPS = torch.tensor([0, 150, 600, 999])


@pytest.mark.parametrize("algorithm", ["lokr", "loha"])
def test_a_lycoris_file_of_every_family_opens_in_its_library_and_predicts_the_same(algorithm: str, tried: Tried, tmp_path: Path) -> None:
    family, batch = tried.family, tried.batch()
    conditioning = family.conditioning(batch, CPU)

    def answer(network: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return family.predict(network.eval(), batch.latents, TIMESTEPS, conditioning)

    options = dataclasses.replace(AdapterOptions(), lora_algorithm=algorithm, lora_rank=4, lora_alpha=8.0, lora_dropout=0.0)
    method = Lycoris(options, family)
    trainable = method.attach(family.load(torch.float32))
    generator = torch.Generator().manual_seed(0)
    trainable.put({name: w.detach() + 0.05 * torch.randn(w.shape, generator=generator) for name, w in trainable.parameters.items()})
    expected = answer(trainable.denoiser)
    files = method.export(trainable, tmp_path / "out", {}, None)
    base = type(trainable.denoiser).from_pretrained(tried.folder, subfolder=trainable.role)
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)}
    for file in files:
        network = type(base).from_pretrained(tried.folder, subfolder=trainable.role)
        assert (answer(network) - expected).abs().max() > 1e-4
        weights = load_file(file)
        if "kohya" in file.name:
            known = {family.kohya_name(name): f"lycoris_{name.replace('.', '_')}" for name in layers if ".transformer_blocks." in name}
            weights = {f"{known[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor for key, tensor in weights.items()}
        adapters, _ = create_lycoris_from_weights(1.0, "", network, weights)
        assert {adapter.lora_name for adapter in adapters.loras} == {key.partition(".")[0] for key in weights}
        adapters.apply_to()
        torch.testing.assert_close(answer(network), expected, atol=1e-5, rtol=0)
    assert any("kohya" in file.name for file in files) == (
        family.kohya_name("mid_block.attentions.0.transformer_blocks.0.attn1.to_q") is not None
    )
