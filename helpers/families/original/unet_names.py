"""Names of U-Net modules in Stability AI's original code, which kohya-style LoRA files use."""

from __future__ import annotations

import re

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_name(module: str, layers_per_block: int, attention_levels: tuple[bool, ...]) -> str:
    """`down_blocks.1.attentions.0.proj_in` => `input_blocks.4.1.proj_in`.

    `layers_per_block` is from the U-Net's config. `attention_levels` says for each up block whether it has attention layers, which
    come between its residual block and its upsampler. Raises KeyError for a module that has no name in the original code.
    """
    if module in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[module]
    match = _BLOCK.fullmatch(module)
    if not match:
        raise KeyError(module)
    part, level, kind, index, inner = match.groups()
    block = f"{_position(part, int(level or 0), kind, int(index), layers_per_block, attention_levels)}"
    if kind == "resnets":
        inner = _RESNET[inner]
    elif kind == "downsamplers":
        inner = inner.replace("conv", "op", 1)
    return f"{block}.{inner}"


def _position(part: str, level: int, kind: str, index: int, layers: int, attention_levels: tuple[bool, ...]) -> str:
    if part == "mid_block":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}"
    if part == "down_blocks":
        # input block 0 is conv_in; each level has its layers and then a downsampler.
        number = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
        return f"input_blocks.{number}.0" if kind in ("resnets", "downsamplers") else f"input_blocks.{number}.1"
    # Up blocks have one layer more than down blocks, and their upsampler shares the last layer's block.
    last = kind == "upsamplers"
    number = level * (layers + 1) + (layers if last else index)
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attention_levels[level] else 1}[kind]
    return f"output_blocks.{number}.{inner}"
