"""LoRA files of networks whose diffusers pipelines cannot load LoRA. PEFT loads them instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpers.families.lora import kohya_file
from helpers.families.lora.scales import scales_of
from helpers.families.original.transformer_names import Names
from helpers.foreign_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "lora_adapter_metadata"  # rank and alpha, under the key that diffusers uses for other pipelines
ROLE = "transformer."  # the prefix of names


def read(path: Path, names: Names) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A LoRA file in the layout that diffusers has for other pipelines, or in kohya's: matrices by PEFT names, and each layer's scale.

    `names` are the original ones of the transformer's modules.
    """
    from safetensors import safe_open

    if kohya_file.is_kohya(path):
        return kohya_file.read(path, names)
    with safe_open(path, "pt") as file:
        settings = parse_json((file.metadata() or {}).get(METADATA_KEY, "{}"))
        matrices = {name.removeprefix(ROLE): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return matrices, scales_of(matrices, settings, ROLE)
