"""Adapter weights in the layout of kohya's scripts, which ComfyUI and most interfaces read: one name for each trained layer.

Such a file tells no settings: a layer's `alpha` over its rank is the factor that its matrices are scaled by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Endings of peft's names => kohya's
KOHYA_ENDINGS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def split_name(name: str) -> tuple[str, str]:
    """peft's name of an adapter weight => its module, and which of the module's weights it is."""
    module, _, ending = name.rpartition(".lora_")
    return module, f"lora_{ending}"


def to_kohya(tensors: Mapping[str, Tensor], factor: float, kohya_name: Callable[[str], str | None]) -> dict[str, Tensor]:
    """LoRA or DoRA weights by peft's names => by kohya's, with the `alpha` that makes `factor` of the rank.

    Nothing where the family has no such layout. DoRA's magnitudes become a column for each output, (out, 1) or (out, 1, 1, 1).
    """
    import torch

    kohya: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, ending = split_name(name)
        renamed = kohya_name(module)
        if renamed is None:
            return {}
        ending = ending.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")  # as text encoders have it
        if ending == "lora_A.weight":
            kohya[f"{renamed}.alpha"] = torch.tensor(factor * tensor.shape[0])
        elif ending == "lora_magnitude_vector":
            tensor = tensor.reshape(-1, *[1] * (tensors[f"{module}.lora_A.weight"].ndim - 1))
        kohya[f"{renamed}.{KOHYA_ENDINGS[ending]}"] = tensor
    return kohya


def kohya_metadata(rank: int, alpha: float, algorithm: str) -> dict[str, str]:
    """What kohya's scripts say of a network in a file's header."""
    described = {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if algorithm == "lora":
        return {**described, "ss_network_module": "networks.lora"}
    return {**described, "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algorithm})}
