"""LoRA files of transformers as ComfyUI reads them: which layers they name, and the change that each gets.

The rules of its loader, known from issue threads and from files that it loads: `lora_unet_` and the base model's own name of a layer, with
underscores for dots, gets alpha / rank x lora_up @ lora_down, where alpha is the tensor beside them. Names that it does not know are left
out with "lora key not loaded" (https://github.com/Comfy-Org/ComfyUI/issues/3701). It loads transformers with their authors' names, in which
queries, keys and values are one layer. These tables are of the published files' headers, written by hand and apart from the product's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers.config.options import AdapterOptions, TextEncoderOptions
from helpers.methods.lora import Lora
from helpers.methods.text_encoders import add_text_encoders
from helpers.protocols import can_train_text_encoders
from tests.families.conftest import Tried, family_name, open_family
from tests.families.test_exports import changed, everywhere

# Layer of the published file => the modules of diffusers whose outputs it has, one below another; "~" before a name: its halves swapped.
SD3 = {
    "x_embedder_proj": ["pos_embed.proj"],
    "t_embedder_mlp_0": ["time_text_embed.timestep_embedder.linear_1"],
    "y_embedder_mlp_2": ["time_text_embed.text_embedder.linear_2"],
    "context_embedder": ["context_embedder"],
    "final_layer_adaLN_modulation_1": ["~norm_out.linear"],
    "final_layer_linear": ["proj_out"],
    "joint_blocks_0_x_block_attn_qkv": [f"transformer_blocks.0.attn.to_{side}" for side in "qkv"],
    "joint_blocks_0_x_block_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "joint_blocks_0_context_block_attn_qkv": [f"transformer_blocks.0.attn.add_{side}_proj" for side in "qkv"],
    "joint_blocks_0_context_block_attn_proj": ["transformer_blocks.0.attn.to_add_out"],
    "joint_blocks_0_x_block_mlp_fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "joint_blocks_0_context_block_mlp_fc2": ["transformer_blocks.0.ff_context.net.2"],
    "joint_blocks_0_x_block_adaLN_modulation_1": ["transformer_blocks.0.norm1.linear"],
    "joint_blocks_0_context_block_adaLN_modulation_1": ["transformer_blocks.0.norm1_context.linear"],
    "joint_blocks_1_context_block_adaLN_modulation_1": ["~transformer_blocks.1.norm1_context.linear"],
}
SD35 = {**SD3, "joint_blocks_0_x_block_attn2_qkv": [f"transformer_blocks.0.attn2.to_{side}" for side in "qkv"]}
PIXART = {
    "x_embedder_proj": ["pos_embed.proj"],
    "t_embedder_mlp_2": ["adaln_single.emb.timestep_embedder.linear_2"],
    "t_block_1": ["adaln_single.linear"],
    "y_embedder_y_proj_fc1": ["caption_projection.linear_1"],
    "final_layer_linear": ["proj_out"],
    "blocks_1_attn_qkv": [f"transformer_blocks.1.attn1.to_{side}" for side in "qkv"],
    "blocks_1_attn_proj": ["transformer_blocks.1.attn1.to_out.0"],
    "blocks_1_cross_attn_q_linear": ["transformer_blocks.1.attn2.to_q"],
    "blocks_1_cross_attn_kv_linear": ["transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_v"],
    "blocks_1_cross_attn_proj": ["transformer_blocks.1.attn2.to_out.0"],
    "blocks_1_mlp_fc1": ["transformer_blocks.1.ff.net.0.proj"],
}
HUNYUAN_DIT = {
    "x_embedder_proj": ["pos_embed.proj"],
    "t_embedder_mlp_0": ["time_extra_emb.timestep_embedder.linear_1"],
    "extra_embedder_2": ["time_extra_emb.extra_embedder.linear_2"],
    "mlp_t5_0": ["text_embedder.linear_1"],
    "pooler_c_proj": ["time_extra_emb.pooler.c_proj"],
    "final_layer_linear": ["proj_out"],
    "final_layer_adaLN_modulation_1": ["~norm_out.linear"],
    "blocks_0_attn1_Wqkv": [f"blocks.0.attn1.to_{side}" for side in "qkv"],
    "blocks_0_attn1_out_proj": ["blocks.0.attn1.to_out.0"],
    "blocks_0_attn2_q_proj": ["blocks.0.attn2.to_q"],
    "blocks_0_attn2_kv_proj": ["blocks.0.attn2.to_k", "blocks.0.attn2.to_v"],
    "blocks_0_mlp_fc2": ["blocks.0.ff.net.2"],
    "blocks_0_default_modulation_1": ["blocks.0.norm1.linear"],
}
TABLES = {
    "sd3": SD3,
    "sd35": SD35,
    "pixart_alpha": PIXART,
    "pixart_sigma": PIXART,
    "hunyuan_dit": HUNYUAN_DIT,
    "hunyuan_dit_11": HUNYUAN_DIT,
}
KINDS: dict[str, dict[str, Any]] = {"alpha twice the rank": {"lora_alpha": 8.0}, "rsLoRA": {"lora_alpha": 3.0, "use_rslora": True}}


# Of U-Nets: names as files of kohya's scripts have them (https://github.com/Comfy-Org/ComfyUI/issues/6397), those of text encoders with
# `lora_te`. The miniature has one layer a block, where SDXL has two: its input block 3 is SDXL's 4.
UNET = "transformer_blocks_0_attn1_to_q", "transformer_blocks.0.attn1.to_q"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj", "encoder.layers.0.self_attn.q_proj"
WITH_TEXT: dict[str, dict[str, tuple[str, str]]] = {
    "sd1": {
        f"lora_unet_down_blocks_0_attentions_0_{UNET[0]}": ("unet", f"down_blocks.0.attentions.0.{UNET[1]}"),
        f"lora_te_{TEXT[0]}": ("text_encoder", TEXT[1]),
    },
    "sdxl": {
        f"lora_unet_input_blocks_3_1_{UNET[0]}": ("unet", f"down_blocks.1.attentions.0.{UNET[1]}"),
        f"lora_te1_{TEXT[0]}": ("text_encoder", TEXT[1]),
        f"lora_te2_{TEXT[0]}": ("text_encoder_2", TEXT[1]),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_encoders_get_the_trained_change_too(name: str, kind: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    family = open_family(family_name(name), miniature(name), tmp_path / "cache")
    assert can_train_text_encoders(family)
    parts = family.load(torch.float32)
    add_text_encoders(parts, family, TextEncoderOptions(), torch.float32, freezes=False)
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=4, **KINDS[kind]), family)
    trainable = changed(method.attach(parts), 0.05)
    found = read_by_the_rules(method.save(trainable, tmp_path / "out")[1], "")
    networks = {"unet": trainable.denoiser, **trainable.text_encoders}
    layers = {
        (role, place.removeprefix("text_model.")): layer.get_delta_weight("default").detach().flatten(1)
        for role, network in networks.items()
        for place, layer in network.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(found) == len(layers)
    for layer, place in WITH_TEXT[name].items():
        assert (found[layer] - layers[place]).norm() <= 1e-5 * layers[place].norm(), layer
    assert sum(change.square().sum().item() for change in found.values()) == pytest.approx(
        sum(change.square().sum().item() for change in layers.values()), rel=1e-5
    )


def read_by_the_rules(path: Path, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """The change of each layer, by its name after the prefix."""
    stored = load_file(path)
    layers = {name.partition(".")[0] for name in stored}
    assert all(layer.startswith(prefix) for layer in layers)
    changes = {}
    for layer in layers:
        up, down = stored[f"{layer}.lora_up.weight"], stored[f"{layer}.lora_down.weight"]
        changes[layer.removeprefix(prefix)] = stored[f"{layer}.alpha"] / down.shape[0] * (up.flatten(1) @ down.flatten(1))
    return changes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLES)
def test_each_layer_gets_the_trained_change(name: str, kind: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """By ComfyUI's rules, as fractions of the change: 1e-5. And the diffusers file keeps B as it was trained, with alpha beside it."""
    family = open_family(family_name(name), miniature(name), tmp_path / "cache")
    rules = tmp_path / "layers.json"
    rules.write_text(json.dumps({"to_k|kv_proj": {"rank": 2, "alpha": 5}, "ff": {"rank": 6}}))
    options = dataclasses.replace(
        AdapterOptions(),
        lora_rank=4,
        lora_targets=everywhere(Tried(name, miniature(name), family)),
        lora_layers=rules if "twice" in kind else None,
        **KINDS[kind],
    )
    method = Lora(options, family)
    trainable = changed(method.attach(family.load(torch.float32)), 0.05)
    files = {path.name: path for path in method.save(trainable, tmp_path / "out")}
    found = read_by_the_rules(files["pytorch_lora_weights.kohya.safetensors"])
    layers = {place: layer for place, layer in trainable.denoiser.named_modules() if isinstance(layer, LoraLayer)}
    assert set(TABLES[name]) <= set(found)
    for layer, modules in TABLES[name].items():
        parts = []
        for module in modules:
            change = layers[module.removeprefix("~")].get_delta_weight("default").detach().flatten(1)
            parts.append(torch.cat(change.chunk(2)[::-1]) if module.startswith("~") else change)
        expected = torch.cat(parts)
        assert (found[layer] - expected).norm() <= 1e-5 * expected.norm(), layer
    assert sum(change.square().sum().item() for change in found.values()) == pytest.approx(
        sum(layer.get_delta_weight("default").square().sum().item() for layer in layers.values()), rel=1e-5
    )  # no layer is left out
    stored = load_file(files["pytorch_lora_weights.safetensors"])
    assert all(torch.equal(stored[f"transformer.{place}.lora_B.weight"], layer.lora_B["default"].weight) for place, layer in layers.items())
    with safe_open(files["pytorch_lora_weights.safetensors"], "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == options.lora_alpha


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma", "hunyuan_dit"])
def test_a_run_can_start_from_a_kohya_file(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """Of parts of fused layers and ranks that differ by layer: every layer is found again with its own rank and change."""
    family = open_family(family_name(name), miniature(name), tmp_path / "cache")
    rules = tmp_path / "layers.json"
    rules.write_text(json.dumps({"to_k": {"rank": 2, "alpha": 6}}))
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=4, lora_alpha=8.0, lora_layers=rules), family)
    first = changed(method.attach(family.load(torch.float32)), 0.05)
    path = method.save(first, tmp_path / "out")[1]
    second = Lora(dataclasses.replace(AdapterOptions(), init_lora=path, lora_alpha=5.0), family).attach(family.load(torch.float32))
    layers = [{n: m for n, m in each.denoiser.named_modules() if isinstance(m, LoraLayer)} for each in (first, second)]
    assert layers[0].keys() == layers[1].keys()
    for place, layer in layers[0].items():
        assert layers[1][place].r == layer.r
        assert torch.allclose(layers[1][place].get_delta_weight("default"), layer.get_delta_weight("default"), atol=1e-6)
