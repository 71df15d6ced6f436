"""LoRA files of transformers with joint attention of text and image tokens (MM-DiT)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.families.lora import kohya_file
from helpers.families.lora.scales import scales_of
from helpers.families.original.transformer_names import Names

if TYPE_CHECKING:
    from torch import Tensor

ROLE = "transformer."  # the prefix of names in diffusers' files
# The projections of joint attention: those of the image tokens, then those of the text tokens.
JOINT_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


def read_lora(pipeline: Any, path: Path, names: Names | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A LoRA file as a diffusers pipeline class reads it: matrices by their PEFT names, and the scale of each layer.

    A file with kohya's names is read by `names`, those of the transformer's modules, where diffusers cannot read it.
    """
    if names and kohya_file.is_kohya(path):
        return kohya_file.read(path, names)
    stored, metadata = pipeline.lora_state_dict(path.parent, weight_name=path.name, return_lora_metadata=True, local_files_only=True)
    matrices = {name.removeprefix(ROLE): matrix for name, matrix in stored.items()}
    return matrices, scales_of(matrices, metadata, ROLE)
