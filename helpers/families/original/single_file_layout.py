"""A model of diffusers' layout => the tensors of one file in Stability AI's layout, which people share models in.

Stable Diffusion 1 and 2, SDXL and its refiner, Stable Diffusion 3 and 3.5. Tensors keep their values and their precision; some are split
differently there. On meta tensors the same functions give names and shapes without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.families.original.transformer_names import SD3, transformer_names
from helpers.families.original.unet_names import original_name
from helpers.protocols import FusedPart, SwappedHalves

NETWORK, VAE = "model.diffusion_model.", "first_stage_model."
QUICK_GELU = "quick_gelu"  # the activation of CLIP's own text encoders; OpenCLIP's have the exact one, and other names
SD3_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}

# Modules of the VAE: of a level, and of its attention.
_RESNET = {"conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class Component:
    """A part of a model: how it is built, and its tensors by diffusers' names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def single_file_tensors(parts: Mapping[str, Component]) -> dict[str, Tensor]:
    """The tensors of the single file, of the parts of a model by their folders' names: unet or transformer, vae, text encoders.

    Raises KeyError for a network that has a layer without a name in that layout.
    """
    is_sd3 = "transformer" in parts
    network = _mmdit(parts["transformer"]) if is_sd3 else _unet(parts["unet"])
    tensors = {NETWORK + name: tensor for name, tensor in network}
    tensors |= {VAE + name: tensor for name, tensor in _vae(parts["vae"])}
    for part, component in parts.items():
        if part.startswith("text_encoder"):
            prefix, named = _encoder(part, component, parts.keys(), is_sd3)
            tensors |= {prefix + name: tensor for name, tensor in named}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _encoder(part: str, component: Component, parts: Any, is_sd3: bool) -> tuple[str, Iterator[tuple[str, Tensor]]]:
    """The prefix of a text encoder's names, and its tensors. SDXL numbers its encoders; the refiner has the second alone."""
    if is_sd3:
        return f"text_encoders.{SD3_ENCODERS[part]}.transformer.", iter(component.tensors.items())
    if "text_encoder_2" in parts:
        number = 1 if part == "text_encoder_2" and "text_encoder" in parts else 0
        if part == "text_encoder":
            return f"conditioner.embedders.{number}.transformer.", _clip(component)
        return f"conditioner.embedders.{number}.model.", _open_clip(component)
    if component.config.get("hidden_act", QUICK_GELU) == QUICK_GELU:
        return "cond_stage_model.transformer.", _clip(component)
    return "cond_stage_model.model.", _open_clip(component)


def _unet(unet: Component) -> Iterator[tuple[str, Tensor]]:
    attention = tuple("CrossAttn" in kind for kind in unet.config["up_block_types"])
    for name, tensor in unet.tensors.items():
        module, _, kind = name.rpartition(".")
        original = "out.0" if module == "conv_norm_out" else original_name(module, unet.config["layers_per_block"], attention)
        yield f"{original}.{kind}", tensor


def _mmdit(transformer: Component) -> Iterator[tuple[str, Tensor]]:
    names = transformer_names(SD3, transformer.config)
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in transformer.tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "pos_embed.pos_embed":
            yield "pos_embed", tensor
            continue
        match names[module]:
            case FusedPart() as part:
                fused.setdefault(f"{part.layer}.{kind}", {})[part.index] = tensor
            case SwappedHalves(layer):
                yield f"{layer}.{kind}", torch.cat(tensor.chunk(2)[::-1])
            case original:
                yield f"{original}.{kind}", tensor
    for layer, parts in fused.items():
        yield layer, torch.cat([parts[index] for index in sorted(parts)])


def _vae(vae: Component) -> Iterator[tuple[str, Tensor]]:
    levels = len(vae.config["block_out_channels"])
    for name, tensor in vae.tensors.items():
        module, _, kind = name.rpartition(".")
        module = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", module)
        module = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", module)
        module = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", module)
        module = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", module)
        module = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", module)
        if "mid_block.attentions.0" in module:
            part = module.partition("mid_block.attentions.0.")[2]
            module = module.replace(f"mid_block.attentions.0.{part}", f"mid.attn_1.{_ATTENTION[part]}")
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor  # a convolution of one pixel there
        module = module.replace("conv_norm_out", "norm_out")
        head, _, last = module.rpartition(".")
        yield ".".join(filter(None, (head, _RESNET.get(last, last), kind))), tensor


def _clip(encoder: Component) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in encoder.tensors.items():
        yield name if name.startswith("text_model.") else f"text_model.{name}", tensor


def _open_clip(encoder: Component) -> Iterator[tuple[str, Tensor]]:
    weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.tensors.items()}
    yield "token_embedding.weight", weights["embeddings.token_embedding.weight"]
    yield "positional_embedding", weights["embeddings.position_embedding.weight"]
    if "text_projection.weight" in weights:
        yield "text_projection", weights["text_projection.weight"].T
    for kind in ("weight", "bias"):
        yield f"ln_final.{kind}", weights[f"final_layer_norm.{kind}"]
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    for layer in sorted(layers):
        for kind in ("weight", "bias"):
            ours = f"encoder.layers.{layer}"
            heads = [weights[f"{ours}.self_attn.{side}_proj.{kind}"] for side in "qkv"]
            yield f"transformer.resblocks.{layer}.attn.in_proj_{kind}", torch.cat(heads)
            for module, original in _CLIP_LAYER.items():
                yield f"transformer.resblocks.{layer}.{original}.{kind}", weights[f"{ours}.{module}.{kind}"]
