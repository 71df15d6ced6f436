"""LoRA weights in kohya's format, which ComfyUI and most other interfaces read: one name for each trained layer.

The scale of a layer is its `alpha` tensor divided by the rank; such a file holds no other settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from helpers.protocols import FusedPart, KohyaName, SwappedHalves

if TYPE_CHECKING:
    from torch import Tensor

# Endings of PEFT's names => kohya's
KOHYA_ENDINGS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def split_name(name: str) -> tuple[str, str]:
    """PEFT's name of an adapter weight => its module, and the ending: `to_q.lora_A.weight` => `to_q`, `lora_A.weight`."""
    module, _, ending = name.rpartition(".lora_")
    return module, f"lora_{ending}"


def to_kohya(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float], kohya_name: Callable[[str], KohyaName | None]
) -> dict[str, Tensor]:
    """LoRA or DoRA weights by PEFT's names => by kohya's, with `alpha` = scale x rank of each layer. `scales` are those of B A by module.

    Empty where the format has no name for one of the layers, and for DoRA on parts of fused layers: the magnitudes of the other parts are
    those of the base model. DoRA's magnitudes (out,) become (out, 1) or, of convolutions, (out, 1, 1, 1).
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, ending = split_name(name)
        ending = ending.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")  # the name in text encoders
        modules.setdefault(module, {})[ending] = tensor
    layers: dict[str, tuple[float, dict[str, Tensor]]] = {}
    fused: dict[str, dict[FusedPart, tuple[float, dict[str, Tensor]]]] = {}
    for module, weights in modules.items():
        match kohya_name(module):
            case None:
                return {}
            case FusedPart() as part if "lora_magnitude_vector" not in weights:
                fused.setdefault(part.layer, {})[part] = scales[module], weights
            case FusedPart():
                return {}
            case SwappedHalves(layer):
                layers[layer] = scales[module], {ending: _swap_outputs(ending, tensor) for ending, tensor in weights.items()}
            case name:
                layers[name] = scales[module], weights
    layers |= {name: _fuse(parts) for name, parts in fused.items()}
    return {
        f"{name}.{ending}": tensor for name, (scale, weights) in layers.items() for ending, tensor in _kohya_layer(weights, scale).items()
    }


def _swap_outputs(ending: str, tensor: Tensor) -> Tensor:
    """The two halves of the output the other way round; A (rank, in) has no outputs."""
    import torch

    return tensor if ending == "lora_A.weight" else torch.cat(tensor.chunk(2)[::-1])


def _kohya_layer(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of one layer by the endings of their names in the format."""
    import torch

    down = weights["lora_A.weight"]
    shapes = {"lora_magnitude_vector": (-1, *[1] * (down.ndim - 1))}
    named = {KOHYA_ENDINGS[ending]: tensor.reshape(shapes.get(ending, tensor.shape)) for ending, tensor in weights.items()}
    return {"alpha": torch.tensor(scale * down.shape[0]), **named}


def _fuse(parts: Mapping[FusedPart, tuple[float, Mapping[str, Tensor]]]) -> tuple[float, dict[str, Tensor]]:
    """One LoRA for a layer whose parts have each their own: A matrices below one another, B matrices on the diagonal.

    Its rank is the sum of theirs, and its change is exactly theirs: zero for parts that were not trained. Parts of several scales share the
    first one's; what the others differ from it is in their B.
    """
    import torch

    ordered = [(part, parts[part]) for part in sorted(parts, key=lambda part: part.index)]
    shared = ordered[0][1][0]
    down = torch.cat([weights["lora_A.weight"] for _, (_, weights) in ordered])
    up = down.new_zeros(sum(ordered[0][0].rows), len(down))
    column = 0
    for part, (scale, weights) in ordered:
        row, rank = sum(part.rows[: part.index]), len(weights["lora_A.weight"])
        up[row : row + part.rows[part.index], column : column + rank] = weights["lora_B.weight"] * (
            1.0 if scale == shared else scale / shared
        )
        column += rank
    return shared, {"lora_A.weight": down, "lora_B.weight": up}


def kohya_metadata(rank: int | None, alpha: float | None, algorithm: str) -> dict[str, str]:
    """The header of a kohya file. None is a rank or alpha that differs between layers."""
    described = {"format": "pt", "ss_network_dim": str(rank or "Dynamic"), "ss_network_alpha": f"{alpha:g}" if alpha else "Dynamic"}
    if algorithm == "lora":
        return {**described, "ss_network_module": "networks.lora"}
    return {**described, "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algorithm})}
