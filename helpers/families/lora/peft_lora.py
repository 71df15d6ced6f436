"""LoRA files of networks whose diffusers pipelines cannot load LoRA. PEFT loads them instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "lora_adapter_metadata"  # rank and alpha, under the key that diffusers uses for other pipelines


def read(path: Path, role: str) -> tuple[dict[str, Tensor], list[float]]:
    """A LoRA file in the layout that diffusers has for other pipelines: matrices by their PEFT names, and the alpha.

    `role` is the prefix of its names: "transformer".
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        matrices = {name.removeprefix(f"{role}."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return matrices, [float(metadata[f"{role}.lora_alpha"])]
