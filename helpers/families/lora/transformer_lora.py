"""LoRA files of transformers with joint attention of text and image tokens (MM-DiT)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# The projections of joint attention: those of the image tokens, then those of the text tokens.
JOINT_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


def read_lora(pipeline: Any, path: Path) -> tuple[dict[str, Tensor], list[float]]:
    """A LoRA file as a diffusers pipeline class reads it: matrices by their PEFT names, and the alpha in the file."""
    stored, metadata = pipeline.lora_state_dict(path.parent, weight_name=path.name, return_lora_metadata=True, local_files_only=True)
    return {name.removeprefix("transformer."): matrix for name, matrix in stored.items()}, [float(metadata["transformer.lora_alpha"])]
