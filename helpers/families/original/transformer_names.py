"""Names of a transformer's modules in its authors' code, where queries, keys and values are one layer.

ComfyUI knows the layers of a base model by these names, and kohya's LoRA files are written with them: `lora_unet_` and the name, with
underscores for its dots. The tables come from published files and from diffusers' own converters:

- Stable Diffusion 3: the header of stabilityai/stable-diffusion-3-medium `sd3_medium.safetensors`. LoRA files of kohya's sd-scripts have
  `lora_unet_joint_blocks_0_context_block_attn_qkv`. Other names are left unread by ComfyUI without an error message:
  https://github.com/Comfy-Org/ComfyUI/issues/3701
- PixArt: https://github.com/huggingface/diffusers/blob/main/scripts/convert_pixart_sigma_to_diffusers.py, whose keys are those of the
  authors' `PixArt-Sigma-XL-2-1024-MS.pth`.
- Hunyuan-DiT: https://github.com/huggingface/diffusers/blob/main/scripts/convert_hunyuandit_to_diffusers.py, whose keys are those of the
  authors' `pytorch_model_ema.pt`. LoRA files for it have `lora_unet_blocks_0_attn1_Wqkv.alpha`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.protocols import FusedPart, KohyaName, SwappedHalves

Names = Mapping[str, KohyaName]  # module of diffusers => module of the authors, or the part of one


@dataclass(frozen=True)
class Layout:
    """The modules outside the blocks, those of each block, and the layers that are several modules in diffusers."""

    outside: Mapping[str, str]
    blocks: str  # name of diffusers' list of blocks
    original_blocks: str  # and of the authors'
    inside: Mapping[str, str]
    fused: Mapping[str, Sequence[str]]  # layer of a block => the modules in it, in the order of their output rows
    # The output has two halves: scale and shift in diffusers, shift and scale there. Modules outside, and in the last block.
    swapped: Sequence[str] = ()
    swapped_in_last: Sequence[str] = ()


_ATTENTION = ("q", "k", "v")

SD3 = Layout(
    outside={
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    blocks="transformer_blocks",
    original_blocks="joint_blocks",
    inside={
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
    },
    fused={
        "x_block.attn.qkv": [f"attn.to_{side}" for side in _ATTENTION],
        "context_block.attn.qkv": [f"attn.add_{side}_proj" for side in _ATTENTION],
        "x_block.attn2.qkv": [f"attn2.to_{side}" for side in _ATTENTION],
    },
    swapped=("norm_out.linear",),
    swapped_in_last=("norm1_context.linear",),
)
PIXART = Layout(
    outside={
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
        "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
        "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
        "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    },
    blocks="transformer_blocks",
    original_blocks="blocks",
    inside={
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    },
    fused={"attn.qkv": [f"attn1.to_{side}" for side in _ATTENTION], "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"]},
)
HUNYUAN_DIT = Layout(
    outside={
        "pos_embed.proj": "x_embedder.proj",
        "text_embedder.linear_1": "mlp_t5.0",
        "text_embedder.linear_2": "mlp_t5.2",
        "time_extra_emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_extra_emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_extra_emb.extra_embedder.linear_1": "extra_embedder.0",
        "time_extra_emb.extra_embedder.linear_2": "extra_embedder.2",
        "time_extra_emb.pooler.k_proj": "pooler.k_proj",
        "time_extra_emb.pooler.q_proj": "pooler.q_proj",
        "time_extra_emb.pooler.v_proj": "pooler.v_proj",
        "time_extra_emb.pooler.c_proj": "pooler.c_proj",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    blocks="blocks",
    original_blocks="blocks",
    inside={
        "norm1.linear": "default_modulation.1",
        "attn1.to_out.0": "attn1.out_proj",
        "attn2.to_q": "attn2.q_proj",
        "attn2.to_out.0": "attn2.out_proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "skip_linear": "skip_linear",
    },
    fused={"attn1.Wqkv": [f"attn1.to_{side}" for side in _ATTENTION], "attn2.kv_proj": ["attn2.to_k", "attn2.to_v"]},
    swapped=("norm_out.linear",),
)


def transformer_names(layout: Layout, config: Mapping[str, Any]) -> dict[str, KohyaName]:
    """Every module of a transformer by diffusers' name => its original name. `config` is the network's own.

    Names of modules that a version of the network does not have are in the mapping too.
    """
    width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    names: dict[str, KohyaName] = dict(layout.outside)
    for number in range(blocks):
        names |= _block(layout, number, width)
    last = f"{layout.blocks}.{blocks - 1}"
    for module in (*layout.swapped, *(f"{last}.{module}" for module in layout.swapped_in_last)):
        names[module] = SwappedHalves(str(names[module]))
    return names


def _block(layout: Layout, number: int, width: int) -> Iterator[tuple[str, KohyaName]]:
    ours, theirs = f"{layout.blocks}.{number}", f"{layout.original_blocks}.{number}"
    for module, original in layout.inside.items():
        yield f"{ours}.{module}", f"{theirs}.{original}"
    for layer, modules in layout.fused.items():
        for index, module in enumerate(modules):
            yield f"{ours}.{module}", FusedPart(f"{theirs}.{layer}", index, (width,) * len(modules))


def kohya_transformer_name(names: Names, module: str) -> KohyaName | None:
    """kohya's name of a module, of the names that `transformer_names` gives; None for a module that has none."""
    match names.get(module):
        case None:
            return None
        case FusedPart() as part:
            return FusedPart(_kohya(part.layer), part.index, part.rows)
        case SwappedHalves() as swapped:
            return SwappedHalves(_kohya(swapped.layer))
        case name:
            return _kohya(name)


def _kohya(original: str) -> str:
    return f"lora_unet_{original.replace('.', '_')}"
