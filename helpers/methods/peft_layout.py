"""A LoRA as a folder that peft opens by itself: for networks whose pipelines in diffusers have no loader for LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.storage.atomic import write_json
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # where peft's own wrapper holds the network


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write matrices by peft's names, with the config that peft described them by => the folder.

    Raises RuntimeError unless they read back to the bit.
    """
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    renamed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_tensors(renamed, folder / WEIGHTS)
    write_json(folder / CONFIG, dict(config))
    stored = load_file(folder / WEIGHTS)
    if stored.keys() != renamed.keys() or not all(torch.equal(stored[name], renamed[name].cpu()) for name in renamed):
        raise RuntimeError(f"{folder / WEIGHTS} does not read back as it was trained.")
    return folder
