"""Names of FLUX.1's modules in Black Forest Labs' code (https://github.com/black-forest-labs/flux).

There, one layer makes queries, keys and values; in single blocks it makes the first half of the MLP too (`linear1`). The names are those of
the published `flux1-dev.safetensors`, and of diffusers' converter of such files. LoRA files of kohya's sd-scripts have
`lora_unet_double_blocks_0_img_attn_qkv` and `lora_unet_single_blocks_0_linear1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from helpers.protocols import FusedPart, KohyaName, SwappedHalves

MLP_RATIO = 4
OUTSIDE: Mapping[str, KohyaName] = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": SwappedHalves("final_layer.adaLN_modulation.1"),
    "proj_out": "final_layer.linear",
}
DOUBLE: Mapping[str, str] = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE: Mapping[str, str] = {
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
# Layers of blocks that are several modules in diffusers, in the order of their output rows.
DOUBLE_FUSED: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE_FUSED: Mapping[str, tuple[str, ...]] = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def flux_names(config: Mapping[str, Any]) -> dict[str, KohyaName]:
    """Every module by diffusers' name => its original name. `config` is the transformer's own."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    names = dict(OUTSIDE)
    for number in range(config["num_layers"]):
        names |= _block(f"transformer_blocks.{number}", f"double_blocks.{number}", DOUBLE, DOUBLE_FUSED, width)
    for number in range(config["num_single_layers"]):
        names |= _block(f"single_transformer_blocks.{number}", f"single_blocks.{number}", SINGLE, SINGLE_FUSED, width)
    return names


def _block(
    ours: str, theirs: str, modules: Mapping[str, str], fused: Mapping[str, tuple[str, ...]], width: int
) -> Iterator[tuple[str, KohyaName]]:
    for module, original in modules.items():
        yield f"{ours}.{module}", f"{theirs}.{original}"
    for layer, parts in fused.items():
        rows = tuple(MLP_RATIO * width if part == "proj_mlp" else width for part in parts)
        for index, part in enumerate(parts):
            yield f"{ours}.{part}", FusedPart(f"{theirs}.{layer}", index, rows)
