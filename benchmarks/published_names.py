"""Tensor names in published LoRA files of attention layers, in diffusers format and in kohya format.

Derived from the architectures (the number of layers and blocks), not from the code that is tested.
"""

from __future__ import annotations

from collections.abc import Iterator

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def transformer_blocks(prefix: str, depth: int) -> Iterator[str]:
    """The projections of `depth` blocks, each with self-attention (attn1) and cross-attention to the text (attn2)."""
    for block in range(depth):
        for attention in ("attn1", "attn2"):
            yield from (f"{prefix}.transformer_blocks.{block}.{attention}.{projection}" for projection in ATTENTION)


def sd2_modules() -> list[str]:
    """Three levels with two layers in the down path and three in the up path, and one in the middle; one block in each layer."""
    down = [f"down_blocks.{level}.attentions.{layer}" for level in (0, 1, 2) for layer in (0, 1)]
    up = [f"up_blocks.{level}.attentions.{layer}" for level in (1, 2, 3) for layer in (0, 1, 2)]
    return [name for part in (*down, "mid_block.attentions.0", *up) for name in transformer_blocks(part, 1)]


def sdxl_modules() -> dict[str, str]:
    """diffusers' name => Stability AI's. A layer has no blocks at the highest resolution, two at the next, ten at the lowest.

    Input block 0 is the first convolution, 3 and 6 downsample by 2. There are nine output blocks; the last three have no attention.
    """
    parts = {
        f"down_blocks.{level}.attentions.{layer}": (f"input_blocks.{1 + 3 * level + layer}.1", depth)
        for level, depth in ((1, 2), (2, 10))
        for layer in (0, 1)
    }
    parts["mid_block.attentions.0"] = ("middle_block.1", 10)
    parts |= {
        f"up_blocks.{level}.attentions.{layer}": (f"output_blocks.{3 * level + layer}.1", depth)
        for level, depth in ((0, 10), (1, 2))
        for layer in (0, 1, 2)
    }
    return {
        ours: theirs
        for part, (original, depth) in parts.items()
        for ours, theirs in zip(transformer_blocks(part, depth), transformer_blocks(original, depth), strict=True)
    }


def sd3_modules() -> list[str]:
    """24 blocks with projections of image tokens and text tokens; the last block only outputs image tokens."""
    of_pictures, of_text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [f"transformer_blocks.{block}.attn.{projection}" for block in range(24) for projection in (*of_pictures, *of_text)]
    return [name for name in names if name != "transformer_blocks.23.attn.to_add_out"]


def sd3_original_modules() -> list[str]:
    """Stability AI's names. Queries, keys and values are one layer there; the last block has no output projection for text."""
    parts = ("x_block.attn.qkv", "x_block.attn.proj", "context_block.attn.qkv", "context_block.attn.proj")
    names = [f"joint_blocks.{block}.{part}" for block in range(24) for part in parts]
    return [name for name in names if name != "joint_blocks.23.context_block.attn.proj"]


def diffusers_layout(role: str, modules: list[str]) -> set[str]:
    return {f"{role}.{module}.{matrix}.weight" for module in modules for matrix in ("lora_A", "lora_B")}


def kohya_layout(modules: list[str]) -> set[str]:
    return {
        f"lora_unet_{module.replace('.', '_')}.{ending}" for module in modules for ending in ("lora_down.weight", "lora_up.weight", "alpha")
    }


PUBLISHED = {  # network => file => tensor names
    "sd2": {
        "pytorch_lora_weights.safetensors": diffusers_layout("unet", sd2_modules()),
        "pytorch_lora_weights.kohya.safetensors": kohya_layout(sd2_modules()),
    },
    "sdxl": {
        "pytorch_lora_weights.safetensors": diffusers_layout("unet", list(sdxl_modules())),
        "pytorch_lora_weights.kohya.safetensors": kohya_layout(list(sdxl_modules().values())),
    },
    "sd3": {
        "pytorch_lora_weights.safetensors": diffusers_layout("transformer", sd3_modules()),
        "pytorch_lora_weights.kohya.safetensors": kohya_layout(sd3_original_modules()),
    },
}
