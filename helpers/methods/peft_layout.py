"""A LoRA as a folder that peft opens by itself: for networks whose pipelines in diffusers have no loader for LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.storage.atomic import write_file, write_json
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."  # where peft's own wrapper holds the network


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: str) -> Path:
    """Write matrices by peft's names, with the config that peft described them by and a model card => the folder.

    `base` is the model that they are for: a folder or its name on the hub. Raises RuntimeError unless they read back to the bit.
    """
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    renamed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_tensors(renamed, folder / WEIGHTS)
    write_json(folder / CONFIG, dict(config))
    write_file(folder / CARD, _card(folder.name, config, base).encode())
    stored = load_file(folder / WEIGHTS)
    if stored.keys() != renamed.keys() or not all(torch.equal(stored[name], renamed[name].cpu()) for name in renamed):
        raise RuntimeError(f"{folder / WEIGHTS} does not read back as it was trained.")
    return folder


def _card(folder: str, config: Mapping[str, Any], base: str) -> str:
    """A model card in the hub's form, with the code that loads the folder as it is named."""
    is_here = Path(base).expanduser().is_dir()
    source = str(Path(base).expanduser().resolve()) if is_here else base
    facts = ["library_name: peft", "tags: [lora, diffusers, simpletuner]"] + ([] if is_here else [f"base_model: {base}"])
    return f"""---
{chr(10).join(facts)}
---

# A LoRA for {Path(base).name}

Rank {config["r"]}, alpha {config["lora_alpha"]:g}, trained with SimpleTuner. Its pipeline in diffusers has no loader for LoRA files;
peft puts the layers into the transformer. From the folder that `{folder}` lies in:

```python
from diffusers import DiffusionPipeline
from peft import PeftModel

pipeline = DiffusionPipeline.from_pretrained({source!r})
PeftModel.from_pretrained(pipeline.transformer, {folder!r})
```

After that the pipeline is called as ever.
"""
