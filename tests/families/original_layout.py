"""A diffusers folder as one file in Stability AI's layout, which people share models in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.families.lora.unet_names import original_name

# Of the VAE: modules of a level, and of its attention.
_RESNET = {"conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


# Of a transformer of Stable Diffusion 3: modules outside its blocks, and in a block those of the picture and of the text.
_MMDIT = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_MMDIT_BLOCK = {
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
}
_MMDIT_QKV = {  # three matrices, which are one there
    "x_block.attn.qkv": [f"attn.to_{side}" for side in "qkv"],
    "context_block.attn.qkv": [f"attn.add_{side}_proj" for side in "qkv"],
    "x_block.attn2.qkv": [f"attn2.to_{side}" for side in "qkv"],
}
_SD3_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def write_single_file(model: Path, path: Path, without: Collection[str] = ()) -> Path:
    """Write the model of a diffusers folder as one file => the file. `without` names text encoders of Stable Diffusion 3 to leave out."""
    parts = {path.name for path in model.iterdir()}
    network = _mmdit(model / "transformer") if "transformer" in parts else _unet(model / "unet")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in network}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(model / "vae")}
    if "transformer" in parts:
        for part in (parts & _SD3_ENCODERS.keys()) - set(without):
            tensors |= {
                f"text_encoders.{_SD3_ENCODERS[part]}.transformer.{name}": tensor for name, tensor in _weights(model / part).items()
            }
    elif {"text_encoder", "text_encoder_2"} <= parts:
        tensors |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in _clip(model / "text_encoder")}
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in _open_clip(model / "text_encoder_2")}
    elif "text_encoder_2" in parts:
        tensors |= {f"conditioner.embedders.0.model.{name}": tensor for name, tensor in _open_clip(model / "text_encoder_2")}
    elif json.loads((model / "text_encoder" / "config.json").read_text())["hidden_act"] == "gelu":  # version 2
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in _open_clip(model / "text_encoder")}
    else:
        tensors |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in _clip(model / "text_encoder")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _weights(folder: Path) -> dict[str, Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def _unet(folder: Path) -> Iterator[tuple[str, Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    attention = tuple("CrossAttn" in kind for kind in config["up_block_types"])
    for name, tensor in _weights(folder).items():
        module, _, kind = name.rpartition(".")
        original = "out.0" if module == "conv_norm_out" else original_name(module, config["layers_per_block"], attention)
        yield f"{original}.{kind}", tensor


def _mmdit(folder: Path) -> Iterator[tuple[str, Tensor]]:
    weights = _weights(folder)
    last = json.loads((folder / "config.json").read_text())["num_layers"] - 1
    yield "pos_embed", weights["pos_embed.pos_embed"]
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in (
            "norm_out.linear",
            f"transformer_blocks.{last}.norm1_context.linear",
        ):  # scale before shift, which are the other way there
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if module in _MMDIT:
            yield f"{_MMDIT[module]}.{kind}", tensor
        elif (match := re.match(r"transformer_blocks\.(\d+)\.(.+)", module)) and match[2] in _MMDIT_BLOCK:
            yield f"joint_blocks.{match[1]}.{_MMDIT_BLOCK[match[2]]}.{kind}", tensor
    for block in range(last + 1):
        for original, sides in _MMDIT_QKV.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.{side}.{kind}" for side in sides]
                if names[0] in weights:
                    yield f"joint_blocks.{block}.{original}.{kind}", torch.cat([weights[name] for name in names])


def _vae(folder: Path) -> Iterator[tuple[str, Tensor]]:
    levels = len(json.loads((folder / "config.json").read_text())["block_out_channels"])
    for name, tensor in _weights(folder).items():
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


def _clip(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _weights(folder).items():
        yield name if name.startswith("text_model.") else f"text_model.{name}", tensor


def _open_clip(folder: Path) -> Iterator[tuple[str, Tensor]]:
    weights = {name.removeprefix("text_model."): tensor for name, tensor in _weights(folder).items()}
    yield "token_embedding.weight", weights["embeddings.token_embedding.weight"]
    yield "positional_embedding", weights["embeddings.position_embedding.weight"]
    if "text_projection.weight" in weights:
        yield "text_projection", weights["text_projection.weight"].T
    for kind in ("weight", "bias"):
        yield f"ln_final.{kind}", weights[f"final_layer_norm.{kind}"]
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    for layer in layers:
        for kind in ("weight", "bias"):
            ours = f"encoder.layers.{layer}"
            heads = [weights[f"{ours}.self_attn.{side}_proj.{kind}"] for side in "qkv"]
            yield f"transformer.resblocks.{layer}.attn.in_proj_{kind}", torch.cat(heads)
            for module, original in _CLIP_LAYER.items():
                yield f"transformer.resblocks.{layer}.{original}.{kind}", weights[f"{ours}.{module}.{kind}"]
