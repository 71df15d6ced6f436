"""A diffusers folder as one file in Stability AI's layout, which people share models in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.families.loading.folder import read_json
from helpers.families.original.single_file_layout import Component, single_file_tensors


def write_single_file(
    model: Path, path: Path, without: Collection[str] = (), metadata: dict[str, str] | None = None, added: Mapping[str, Tensor] = {}
) -> Path:
    """Write the model of a diffusers folder as one file => the file.

    `without` names text encoders of Stable Diffusion 3 to leave out; `added` are more tensors, or others in place of the model's.
    """
    parts = {}
    for folder in sorted(model.iterdir()):
        weights = list(folder.glob("*.safetensors")) if folder.is_dir() else []
        if weights and folder.name not in without:
            parts[folder.name] = Component(read_json(folder / "config.json"), load_file(weights[0]))
    save_file({**single_file_tensors(parts), **added}, path, metadata)
    return path
