"""Merges a LoRA into a model: the base model with its change, as a folder or one file, for tools and for further training.

merge_into_folder(family, Path("my.safetensors"), Path("pipeline"), Path("merged"), strength=0.8)
write_single_file(Path("merged"), Path("merged.safetensors"), modelspec_of_model(family.modelspec("")))
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import ModelError
from helpers.families.loading.components import weight_files
from helpers.families.lora.scales import modules_of
from helpers.storage.atomic import atomic_folder
from helpers.storage.tensors import first_not_finite, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.protocols import ModelFamily

TEXT_ROLES = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")


def merge_into_folder(family: ModelFamily, lora: Path, source: Path, target: Path, strength: float = 1.0) -> Path:
    """Write a copy of the diffusers folder `source` with a LoRA of its family merged in. => `target`

    Raises ModelError for a file that is no LoRA of the family or has layers that the model does not have, and for numbers that are not
    finite.
    """
    matrices, scales = _read(family, lora)
    roles: dict[str, dict[str, Tensor]] = {}
    for name, tensor in matrices.items():
        role = next((text for text in TEXT_ROLES if name.startswith(text)), "")
        roles.setdefault(role, {})[name.removeprefix(role)] = tensor
    denoiser = "transformer" if (source / "transformer").is_dir() else "unet"
    with atomic_folder(target) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
        for role, own in roles.items():
            component = aside / (role.rstrip(".") or denoiser)
            _merge_component(component, own, {m: scales.get(role + m, 1.0) * strength for m in modules_of(own)}, lora, strength)
    return target


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """A weight (out, in[, h, w]) with a LoRA merged in, computed in float32, in the weight's own precision.

    down (rank, in[, h, w]), up (out, rank[, 1, 1]); `scale` is that of up @ down, the strength included. With a magnitude (out,) it is a
    DoRA (Liu et al., 2024): W + strength (m (W + dW) / ||W + dW|| - W), with the norm of each output row and dW at full strength.
    """
    full = weight.float()
    change = (up.float().flatten(1) @ down.float().flatten(1)).reshape(full.shape)
    if magnitude is None:
        return (full + scale * change).to(weight.dtype)
    directed = full + scale / strength * change
    rows = (-1, *[1] * (full.ndim - 1))
    norm = directed.flatten(1).norm(dim=1).reshape(rows)
    return (full + strength * (magnitude.float().reshape(rows) * directed / norm - full)).to(weight.dtype)


def _read(family: ModelFamily, lora: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    from safetensors.torch import load_file

    try:
        stored = load_file(lora)
        matrices, scales = family.read_lora(lora)
    except Exception as error:  # of the libraries, of many kinds
        raise ModelError(f"{lora} cannot be read as a LoRA of {family.facts.title}: use one of this kind of model.") from error
    if tensor := first_not_finite(stored):
        raise ModelError(f"{lora} holds numbers that are not finite, in {tensor}: use another file.")
    if any(name.endswith(".dora_scale") for name in stored):
        raise ModelError(f"{lora} is a DoRA in kohya format, whose magnitudes diffusers does not read: merge its diffusers file.")
    return matrices, scales


def _merge_component(component: Path, matrices: Mapping[str, Tensor], scales: Mapping[str, float], lora: Path, strength: float) -> None:
    """Merge the layers of one network into its weight files."""
    from safetensors.torch import load_file

    left = set(modules_of(matrices))
    for path in weight_files(component, None) if component.is_dir() else ():
        if path.suffix != ".safetensors":
            continue
        tensors = load_file(path)
        for module in sorted(left):
            if (name := _weight_name(module, tensors)) is None:
                continue
            magnitude = next((matrices[module + ending] for ending in MAGNITUDES if module + ending in matrices), None)
            down, up = matrices[f"{module}.lora_A.weight"], matrices[f"{module}.lora_B.weight"]
            tensors[name] = merged(tensors[name], down, up, scales[module], magnitude, strength)
            left.discard(module)
        save_tensors(tensors, path)
    if left:
        raise ModelError(
            f"{lora} has {len(left)} layers that {component.name} does not have, such as {min(left)}: use a LoRA of this model."
        )


def _weight_name(module: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a layer's weight in a file; text encoders may lack a level of names there."""
    names = (f"{module}.weight", f"text_model.{module}.weight", f"{module.removeprefix('text_model.')}.weight")
    return next((name for name in names if name in tensors), None)
