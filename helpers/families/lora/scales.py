"""The scale of each layer in a LoRA file: a reader adds scale x B A to the layer's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DOWN = ".lora_A.weight"


def modules_of(matrices: Mapping[str, Tensor]) -> list[str]:
    """The layers of a LoRA, by the PEFT names of its matrices."""
    return [name.removesuffix(DOWN) for name in matrices if name.endswith(DOWN)]


def scales_of(matrices: Mapping[str, Tensor], settings: Mapping[str, Any] | None, prefix: str = "") -> dict[str, float]:
    """The scale of each layer by PEFT's settings: alpha / rank, with rsLoRA alpha / sqrt(rank).

    `settings` are `lora_adapter_metadata` of a diffusers file, whose keys begin with `prefix`: "unet.". A file without it has alpha = rank.
    `alpha_pattern` replaces the alpha of some layers; the rank of each is that of its matrices.
    """
    own = {key.removeprefix(prefix): value for key, value in (settings or {}).items() if key.startswith(prefix)}
    scales = {}
    for module in modules_of(matrices):
        rank = len(matrices[module + DOWN])
        alpha = _by_pattern(own.get("alpha_pattern") or {}, module, own.get("lora_alpha", rank))
        scales[module] = float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
    return scales


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """PEFT compares keys with the end of a module's name, or all of it."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module), otherwise)
