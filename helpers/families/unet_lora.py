"""LoRA files of U-Nets: the names that other tools know the modules by, and what diffusers reads from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.families.unet_names import OUTSIDE_BLOCKS, original_name

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")  # what an adapter goes to unless the user names others
PREFIX = "lora_unet_"
ADDED = {module: original for module, original in OUTSIDE_BLOCKS.items() if module.startswith("add_embedding.")}


def kohya_name_of_original(module: str, unet: Mapping[str, Any]) -> str:
    """kohya's name of a module of SDXL, made of its name in Stability AI's code. `unet` is the U-Net's config."""
    attention_levels = tuple("CrossAttn" in kind for kind in unet["up_block_types"])
    return PREFIX + original_name(module, unet["layers_per_block"], attention_levels).replace(".", "_")


def kohya_name(module: str) -> str:
    """kohya's name of a module of Stable Diffusion 1 and 2, made of its name in diffusers.

    The embedding of SDXL's numbers has its original name: diffusers knows it by that alone.
    """
    return PREFIX + ADDED.get(module, module).replace(".", "_")


def read_lora(pipeline: Any, path: Path, unet: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """What a pipeline class of diffusers makes of a LoRA file: matrices by peft's names, and every alpha it found."""
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import convert_unet_state_dict_to_peft

    stored, alphas, metadata = pipeline.lora_state_dict(
        path.parent, weight_name=path.name, unet_config=FrozenDict(unet), return_lora_metadata=True, local_files_only=True
    )
    matrices = convert_unet_state_dict_to_peft({name.removeprefix("unet."): matrix for name, matrix in stored.items()})
    found = list((alphas or {}).values()) or [metadata["unet.lora_alpha"]]
    return matrices, [float(alpha) for alpha in found]
