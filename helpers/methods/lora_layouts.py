"""LoRA weights in kohya's format, which ComfyUI and most other interfaces read: one name for each trained layer.

The scale of a layer is its `alpha` tensor divided by the rank; such a file holds no other settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from helpers.protocols import FusedPart

if TYPE_CHECKING:
    from torch import Tensor

# Endings of PEFT's names => kohya's
KOHYA_ENDINGS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def split_name(name: str) -> tuple[str, str]:
    """PEFT's name of an adapter weight => its module, and the ending: `to_q.lora_A.weight` => `to_q`, `lora_A.weight`."""
    module, _, ending = name.rpartition(".lora_")
    return module, f"lora_{ending}"


def to_kohya(tensors: Mapping[str, Tensor], factor: float, kohya_name: Callable[[str], str | FusedPart | None]) -> dict[str, Tensor]:
    """LoRA or DoRA weights by PEFT's names => by kohya's, with `alpha` = `factor` x rank.

    Empty where the format has no name for one of the layers, and for DoRA on parts of fused layers: the magnitudes of the other parts are
    those of the base model. DoRA's magnitudes (out,) become (out, 1) or, of convolutions, (out, 1, 1, 1).
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, ending = split_name(name)
        ending = ending.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")  # the name in text encoders
        modules.setdefault(module, {})[ending] = tensor
    layers: dict[str, dict[str, Tensor]] = {}
    fused: dict[str, dict[FusedPart, dict[str, Tensor]]] = {}
    for module, weights in modules.items():
        match kohya_name(module):
            case None:
                return {}
            case FusedPart() as part if "lora_magnitude_vector" not in weights:
                fused.setdefault(part.layer, {})[part] = weights
            case FusedPart():
                return {}
            case name:
                layers[name] = weights
    layers |= {name: _fuse(parts) for name, parts in fused.items()}
    return {f"{name}.{ending}": tensor for name, weights in layers.items() for ending, tensor in _kohya_layer(weights, factor).items()}


def _kohya_layer(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The tensors of one layer by the endings of their names in the format."""
    import torch

    down = weights["lora_A.weight"]
    shapes = {"lora_magnitude_vector": (-1, *[1] * (down.ndim - 1))}
    named = {KOHYA_ENDINGS[ending]: tensor.reshape(shapes.get(ending, tensor.shape)) for ending, tensor in weights.items()}
    return {"alpha": torch.tensor(factor * down.shape[0]), **named}


def _fuse(parts: Mapping[FusedPart, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One LoRA for a layer whose parts have each their own: A matrices below one another, B matrices on the diagonal.

    Its rank is the sum of theirs, and its change is exactly theirs: zero for parts that were not trained.
    """
    import torch

    ordered = [(part, parts[part]) for part in sorted(parts, key=lambda part: part.index)]
    down = torch.cat([weights["lora_A.weight"] for _, weights in ordered])
    up = down.new_zeros(sum(ordered[0][0].rows), len(down))
    column = 0
    for part, weights in ordered:
        row, rank = sum(part.rows[: part.index]), len(weights["lora_A.weight"])
        up[row : row + part.rows[part.index], column : column + rank] = weights["lora_B.weight"]
        column += rank
    return {"lora_A.weight": down, "lora_B.weight": up}


def kohya_metadata(rank: int, alpha: float, algorithm: str) -> dict[str, str]:
    """The header of a kohya file."""
    described = {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if algorithm == "lora":
        return {**described, "ss_network_module": "networks.lora"}
    return {**described, "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algorithm})}
