"""LoRA weights in kohya's format, which ComfyUI and most other interfaces read: one name for each trained layer.

The scale of a layer is its `alpha` tensor divided by the rank; such a file holds no other settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Endings of PEFT's names => kohya's
KOHYA_ENDINGS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def split_name(name: str) -> tuple[str, str]:
    """PEFT's name of an adapter weight => its module, and the ending: `to_q.lora_A.weight` => `to_q`, `lora_A.weight`."""
    module, _, ending = name.rpartition(".lora_")
    return module, f"lora_{ending}"


def to_kohya(tensors: Mapping[str, Tensor], factor: float, kohya_name: Callable[[str], str | None]) -> dict[str, Tensor]:
    """LoRA or DoRA weights by PEFT's names => by kohya's, with `alpha` = `factor` x rank. Empty where the family has no kohya names.

    DoRA's magnitudes (out,) become (out, 1) or, of convolutions, (out, 1, 1, 1).
    """
    import torch

    kohya: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, ending = split_name(name)
        renamed = kohya_name(module)
        if renamed is None:
            return {}
        ending = ending.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")  # the name in text encoders
        if ending == "lora_A.weight":
            kohya[f"{renamed}.alpha"] = torch.tensor(factor * tensor.shape[0])
        elif ending == "lora_magnitude_vector":
            tensor = tensor.reshape(-1, *[1] * (tensors[f"{module}.lora_A.weight"].ndim - 1))
        kohya[f"{renamed}.{KOHYA_ENDINGS[ending]}"] = tensor
    return kohya


def kohya_metadata(rank: int, alpha: float, algorithm: str) -> dict[str, str]:
    """The header of a kohya file."""
    described = {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if algorithm == "lora":
        return {**described, "ss_network_module": "networks.lora"}
    return {**described, "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algorithm})}
