"""LoRA files in kohya's format for transformers, whose layers have the authors' names (helpers/families/original/transformer_names.py).

The rule of their readers: the layer `lora_unet_X` gets alpha / rank x up @ down, where alpha is the tensor `X.alpha` and the rank is the
number of rows of `lora_down`. Without an alpha tensor the scale is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpers.families.original.transformer_names import Names, kohya_transformer_name
from helpers.protocols import FusedPart, KohyaName, SwappedHalves

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"


def is_kohya(path: Path) -> bool:
    """Whether a LoRA file has kohya's names."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return any(name.endswith(f".{DOWN}") for name in file.keys())  # noqa: SIM118  # no mapping


def read(path: Path, names: Names) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The matrices by PEFT names, and the scale of each layer. `names` are those of the network's modules.

    Parts of fused layers get the rows of the layer's B that are theirs, and the columns of the rank that reach them. KeyError for a layer
    that the network does not have.
    """
    from safetensors.torch import load_file

    stored = load_file(path)
    matrices: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    unread = {name.rpartition(f".{DOWN}")[0] for name in stored if name.endswith(f".{DOWN}")}
    for module in names:
        kohya = kohya_transformer_name(names, module)
        layer = _layer(kohya)
        if f"{layer}.{DOWN}" not in stored:
            continue
        unread.discard(layer)
        down, up = stored[f"{layer}.{DOWN}"], stored[f"{layer}.{UP}"]
        alpha = stored.get(f"{layer}.{ALPHA}")
        if (pair := _part(kohya, down, up)) is not None:
            matrices[f"{module}.lora_A.weight"], matrices[f"{module}.lora_B.weight"] = pair
            scales[module] = 1.0 if alpha is None else float(alpha) / len(down)
    if unread:
        raise KeyError(min(unread))
    return matrices, scales


def _layer(kohya: KohyaName | None) -> str:
    return kohya.layer if isinstance(kohya, FusedPart | SwappedHalves) else str(kohya)


def _part(kohya: KohyaName | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """A and B of a module, of those of its layer; None for a part that the LoRA does not change."""
    import torch

    if isinstance(kohya, SwappedHalves):
        return down, torch.cat(up.chunk(2)[::-1])
    if not isinstance(kohya, FusedPart):
        return down, up
    first = sum(kohya.rows[: kohya.index])
    own = up[first : first + kohya.rows[kohya.index]]
    used = own.flatten(1).any(0) if own.ndim == 2 else own.flatten(2).any(2).any(0)
    return (down[used].contiguous(), own[:, used].contiguous()) if used.any() else None
