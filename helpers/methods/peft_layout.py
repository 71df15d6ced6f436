"""A LoRA as a PEFT folder, for networks whose diffusers pipelines cannot load LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.storage.atomic import write_file, write_json
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."  # of the network in PEFT's wrapper


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: str) -> Path:
    """Write matrices under their PEFT names, PEFT's config and a model card. => the folder

    `base` is the base model: a folder or its name on the hub. Raises RuntimeError unless the file holds the same bits.
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
        raise RuntimeError(f"{folder / WEIGHTS} does not hold the trained weights.")
    return folder


def _card(folder: str, config: Mapping[str, Any], base: str) -> str:
    """A model card for the hub, with the code that loads the folder."""
    is_here = Path(base).expanduser().is_dir()
    source = str(Path(base).expanduser().resolve()) if is_here else base
    facts = ["library_name: peft", "tags: [lora, diffusers, simpletuner]"] + ([] if is_here else [f"base_model: {base}"])
    return f"""---
{chr(10).join(facts)}
---

# A LoRA for {Path(base).name}

Rank {config["r"]}, alpha {config["lora_alpha"]:g}, trained with SimpleTuner. The diffusers pipeline of this model cannot load LoRA files;
PEFT adds the layers to the transformer. Run this in the folder that contains `{folder}`:

```python
from diffusers import DiffusionPipeline
from peft import PeftModel

pipeline = DiffusionPipeline.from_pretrained({source!r})
PeftModel.from_pretrained(pipeline.transformer, {folder!r})
```

Then call the pipeline as usual.
"""
