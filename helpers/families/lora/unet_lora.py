"""LoRA files of U-Nets: module names in kohya format, and reading a file with diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def read_lora(pipeline: Any, path: Path, unet: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """A LoRA file as a diffusers pipeline class reads it: matrices by their PEFT names, and every alpha in the file.

    Names of text encoders begin with their role.
    """
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    stored, alphas, metadata = pipeline.lora_state_dict(
        path.parent, weight_name=path.name, unet_config=FrozenDict(unet), return_lora_metadata=True, local_files_only=True
    )
    text = {name: matrix for name, matrix in stored.items() if name.startswith(TEXT)}
    of_unet = {name.removeprefix("unet."): matrix for name, matrix in stored.items() if name not in text}
    matrices = convert_unet_state_dict_to_peft(of_unet)
    if text:
        matrices |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))
    found = list((alphas or {}).values()) or [alpha for name, alpha in (metadata or {}).items() if name.endswith(".lora_alpha")]
    return matrices, [float(alpha) for alpha in found]
