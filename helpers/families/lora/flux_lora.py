"""LoRA files of FLUX.1.

In kohya's format, as in Black Forest Labs' code, one layer makes queries, keys and values, and in single blocks the first half of the MLP
too. Here and in diffusers they are layers of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.families.lora import transformer_lora
from helpers.protocols import FusedPart

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "lora_unet_"
PUBLISHED_WIDTH = 3072  # diffusers' reader of kohya files has the widths of the published networks written in
MLP_RATIO = 4
# Layers of a block by their names in diffusers => in Black Forest Labs' code, and where they are a part of it, which.
DOUBLE: Mapping[str, tuple[str, int | None]] = {
    "attn.to_q": ("img_attn_qkv", 0),
    "attn.to_k": ("img_attn_qkv", 1),
    "attn.to_v": ("img_attn_qkv", 2),
    "attn.to_out.0": ("img_attn_proj", None),
    "attn.add_q_proj": ("txt_attn_qkv", 0),
    "attn.add_k_proj": ("txt_attn_qkv", 1),
    "attn.add_v_proj": ("txt_attn_qkv", 2),
    "attn.to_add_out": ("txt_attn_proj", None),
    "ff.net.0.proj": ("img_mlp_0", None),
    "ff.net.2": ("img_mlp_2", None),
    "ff_context.net.0.proj": ("txt_mlp_0", None),
    "ff_context.net.2": ("txt_mlp_2", None),
    "norm1.linear": ("img_mod_lin", None),
    "norm1_context.linear": ("txt_mod_lin", None),
}
SINGLE: Mapping[str, tuple[str, int | None]] = {
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation_lin", None),
}
BLOCKS: Mapping[str, tuple[str, Mapping[str, tuple[str, int | None]]]] = {
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}
_MODULE = re.compile(rf"({'|'.join(BLOCKS)})\.(\d+)\.(.+)")


def kohya_name(module: str, transformer: Mapping[str, Any]) -> str | FusedPart | None:
    """The name in kohya's format; `transformer` is the network's config.

    None for layers outside the blocks: diffusers reads them from kohya files without their scale, or not at all.
    """
    match = _MODULE.fullmatch(module)
    if not match or match[3] not in BLOCKS[match[1]][1]:
        return None
    kind, layers = BLOCKS[match[1]]
    layer, index = layers[match[3]]
    name = f"{PREFIX}{kind}_{match[2]}_{layer}"
    return name if index is None else FusedPart(name, index, _rows(layer, _width(transformer)))


def read_lora(path: Path, transformer: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """What diffusers reads from a file: matrices by PEFT's names, and alphas, where it has not applied the scale already.

    For a network of another width than the published ones' kohya files are read here.
    """
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    stored = load_file(path)
    if not any(name.endswith(".lora_down.weight") for name in stored):
        return transformer_lora.read_lora(FluxPipeline, path)
    if _width(transformer) != PUBLISHED_WIDTH:
        return _from_kohya(stored, transformer), []
    matrices = FluxPipeline.lora_state_dict(path.parent, weight_name=path.name, local_files_only=True)
    return {name.removeprefix("transformer."): matrix for name, matrix in matrices.items()}, []


def _from_kohya(stored: Mapping[str, Tensor], transformer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Matrices of a kohya file by PEFT's names, with the scale applied. The parts of a fused layer share its A, and have rows of its B."""
    matrices: dict[str, Tensor] = {}
    for module in _modules(transformer):
        name = kohya_name(module, transformer)
        layer = name.layer if isinstance(name, FusedPart) else name
        if f"{layer}.lora_down.weight" not in stored:
            continue
        down, up = stored[f"{layer}.lora_down.weight"], stored[f"{layer}.lora_up.weight"]
        alpha = float(stored.get(f"{layer}.alpha", len(down)))
        if isinstance(name, FusedPart):
            up = up.split(name.rows)[name.index]
        matrices[f"{module}.lora_A.weight"], matrices[f"{module}.lora_B.weight"] = down * (alpha / len(down)), up
    return matrices


def _modules(transformer: Mapping[str, Any]) -> list[str]:
    """The layers of all blocks, by their names in diffusers."""
    counts = {"transformer_blocks": transformer["num_layers"], "single_transformer_blocks": transformer["num_single_layers"]}
    return [f"{kind}.{index}.{layer}" for kind, count in counts.items() for index in range(count) for layer in BLOCKS[kind][1]]


def _width(transformer: Mapping[str, Any]) -> int:
    return int(transformer["num_attention_heads"] * transformer["attention_head_dim"])


def _rows(layer: str, width: int) -> tuple[int, ...]:
    return (width, width, width, MLP_RATIO * width) if layer == "linear1" else (width, width, width)
