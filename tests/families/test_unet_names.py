"""Names of U-Net layers in kohya's layout. The expected names of SDXL's are those of published LoRAs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from helpers.config.options import AdapterOptions
from helpers.families.original.unet_names import original_name
from helpers.methods.lora import Lora
from tests.families.conftest import Tried

SDXL_LEVELS = (True, True, False)  # up blocks, of which the last has no attention


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k", "input_blocks.8.1.transformer_blocks.9.attn2.to_k"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "middle_block.1.transformer_blocks.0.ff.net.0.proj"),
        ("up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0", "output_blocks.2.1.transformer_blocks.0.attn1.to_out.0"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.resnets.0.conv_shortcut", "output_blocks.3.0.skip_connection"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_names_of_sdxl(module: str, name: str) -> None:
    assert original_name(module, 2, SDXL_LEVELS) == name


def test_what_the_layout_has_no_name_for_is_an_error() -> None:
    with pytest.raises(KeyError):
        original_name("class_embedding", 2, SDXL_LEVELS)


WRITTEN = {
    "sd1": ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "stable-diffusion-v1/lora", "sd_v1"),
    "sd2": ("mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0", "stable-diffusion-v2-768-v/lora", "sd_v2_v"),
    "sdxl": ("input_blocks_3_1_transformer_blocks_0_attn1_to_q", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    "sdxl_refiner": (
        "up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
        "stable-diffusion-xl-v1-refiner/lora",
        "sdxl_refiner_v1-0",
    ),
}


@pytest.mark.parametrize("tried", WRITTEN, indirect=True)
def test_a_kohya_file_has_the_names_that_its_readers_know_and_says_what_it_is_for(tried: Tried, tmp_path: Path) -> None:
    name, *described = WRITTEN[tried.miniature]
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=4), tried.family)
    _, path = method.save(method.attach(tried.family.load(torch.float32)), tmp_path)
    with safe_open(path, "pt") as file:
        assert {f"lora_unet_{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(file.keys())
        metadata = file.metadata()
    assert [metadata[key] for key in ("modelspec.architecture", "ss_base_model_version")] == described
    assert metadata["modelspec.resolution"] == "64x64"
