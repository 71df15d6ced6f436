"""LoRA files of full-size networks have the tensor names of published files. The networks are on the meta device, without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.published_names import PUBLISHED
from benchmarks.real_size import NETWORKS, family_of, random_network
from helpers.config.options import AdapterOptions
from helpers.methods.lora import Lora
from helpers.methods.lora_layouts import to_kohya
from helpers.methods.quantized_base import count_weights

SIZES = {"sd2": 865_910_724, "sdxl": 2_567_463_684, "sd3": 2_028_328_000}  # weights of the published networks


@pytest.mark.parametrize("name", NETWORKS)
def test_names_are_those_of_published_files(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    family = family_of(network, tmp_path)
    with torch.device("meta"):
        parts = random_network(network)
        assert count_weights(parts.denoiser) == SIZES[name]
        method = Lora(AdapterOptions(), family)
        trainable = method.attach(parts)
    tensors = {f"{parameter.replace('.default', '')}": weights for parameter, weights in trainable.parameters.items()}
    found = {"pytorch_lora_weights.safetensors": {f"{trainable.role}.{parameter}" for parameter in tensors}}
    scales = {name.partition(".lora_")[0]: 1.0 for name in tensors}
    if kohya := to_kohya(tensors, scales, family.kohya_name):
        found["pytorch_lora_weights.kohya.safetensors"] = set(kohya)
    assert found == PUBLISHED[name]
