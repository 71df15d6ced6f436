"""LoRA files of transformers whose text and picture tokens attend to each other (MM-DiT)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# The projections of joint attention: of the picture's tokens, and of the text's.
JOINT_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


def read_lora(pipeline: Any, path: Path) -> tuple[dict[str, Tensor], list[float]]:
    """What a pipeline class of diffusers makes of a LoRA file: matrices by peft's names, and the alpha it found."""
    stored, metadata = pipeline.lora_state_dict(path.parent, weight_name=path.name, return_lora_metadata=True, local_files_only=True)
    return {name.removeprefix("transformer."): matrix for name, matrix in stored.items()}, [float(metadata["transformer.lora_alpha"])]
