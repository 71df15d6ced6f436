"""LoRA files of U-Nets: module names in kohya format, and reading a file with diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.families.lora.scales import DOWN, modules_of, scales_of
from helpers.families.original.unet_names import OUTSIDE_BLOCKS, original_name

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")  # the default --lora_targets
PREFIX = "lora_unet_"
TEXT = ("text_encoder.", "text_encoder_2.")
ADDED = {module: original for module, original in OUTSIDE_BLOCKS.items() if module.startswith("add_embedding.")}


def kohya_name_of_original(module: str, unet: Mapping[str, Any]) -> str:
    """kohya's name of an SDXL module, built from its name in Stability AI's code. `unet` is the U-Net's config."""
    if name := kohya_name_of_text(module, {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}):
        return name
    attention_levels = tuple("CrossAttn" in kind for kind in unet["up_block_types"])
    return PREFIX + original_name(module, unet["layers_per_block"], attention_levels).replace(".", "_")


def kohya_name(module: str) -> str:
    """kohya's name of a module of Stable Diffusion 1 and 2, built from its name in diffusers.

    `add_embedding` of SDXL has its original name, because diffusers reads no other.
    """
    if name := kohya_name_of_text(module, {"text_encoder": "lora_te_"}):
        return name
    return PREFIX + ADDED.get(module, module).replace(".", "_")


def kohya_name_of_text(module: str, prefixes: Mapping[str, str]) -> str | None:
    """kohya's name of a module of a text encoder, whose name begins with the encoder's role. None for modules of the U-Net."""
    role, _, name = module.partition(".")
    return prefixes[role] + name.replace(".", "_") if role in prefixes else None


def read_lora(pipeline: Any, path: Path, unet: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A LoRA file as a diffusers pipeline class reads it: matrices by their PEFT names, and the scale of each layer.

    Names of text encoders begin with their role.
    """
    import torch
    from diffusers.configuration_utils import FrozenDict

    stored, alphas, metadata = pipeline.lora_state_dict(
        path.parent, weight_name=path.name, unet_config=FrozenDict(unet), return_lora_metadata=True, local_files_only=True
    )
    matrices = _peft_names(stored)
    if alphas:  # by the names of the first matrices, before they were converted
        named = _peft_names({name.removesuffix(".alpha"): torch.tensor(alpha) for name, alpha in alphas.items()})
        found = {name.removesuffix(DOWN): float(alpha) for name, alpha in named.items()}
        return matrices, {module: found.get(module, rank) / rank for module, rank in _ranks(matrices).items()}
    roles = {module: _role(module) for module in modules_of(matrices)}
    scales: dict[str, float] = {}
    for role in set(roles.values()):
        own = {name: matrix for name, matrix in matrices.items() if _role(name) == role}
        bare = {name.removeprefix(role) if role in TEXT else name: matrix for name, matrix in own.items()}
        scales |= {(role if role in TEXT else "") + module: scale for module, scale in scales_of(bare, metadata, role).items()}
    return matrices, scales


def _role(name: str) -> str:
    return next((role for role in TEXT if name.startswith(role)), "unet.")


def _ranks(matrices: Mapping[str, Tensor]) -> dict[str, int]:
    return {module: len(matrices[module + DOWN]) for module in modules_of(matrices)}


def _peft_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that diffusers gives them => by PEFT's."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    text = {name: matrix for name, matrix in stored.items() if name.startswith(TEXT)}
    named = dict(convert_unet_state_dict_to_peft({name.removeprefix("unet."): m for name, m in stored.items() if name not in text}))
    return named | (dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))) if text else {})
