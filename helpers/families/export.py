"""What a family hands over: a complete model folder around a trained network, and the description of a LoRA file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.families.checkpoint import Checkpoint
from helpers.families.tokenizer_files import complete_clip_tokenizer
from helpers.storage.atomic import write_json


def write_pipeline(base: Checkpoint, replaced: Mapping[str, Path], schedule: Mapping[str, Any], target: Path) -> None:
    """A complete diffusers folder: the base model with the folders in `replaced` and this noise schedule, whose `_class_name` samples.

    Every component that the base model has is copied, but for weights in formats that are not safetensors.
    """
    import diffusers

    sampler = schedule.get("_class_name", "EulerDiscreteScheduler")
    index = {**base.index, "scheduler": ["diffusers", sampler]}
    for component in _components(index):
        source = replaced.get(component, base.folder / component)
        if component == "scheduler":
            getattr(diffusers, sampler).from_config(dict(schedule)).save_pretrained(target / component)
        elif source.is_dir():
            shutil.copytree(source, target / component, ignore=shutil.ignore_patterns("*.bin", "*.msgpack", "*.onnx*", "*.ckpt"))
        else:
            index[component] = [None, None]  # named and not there, as the safety checker of many a copy
        if component.startswith("tokenizer"):
            complete_clip_tokenizer(target / component)
    write_json(target / "model_index.json", index)


def _components(index: Mapping[str, Any]) -> list[str]:
    """The names in a model_index.json that stand for a folder: [library, class], and not [null, null]."""
    return [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0] is not None]


def modelspec(base: Checkpoint, architecture: str, implementation: str, base_version: str, edge: int | None) -> dict[str, str]:
    """Metadata of a LoRA file: `modelspec.*` of Stability AI's model specification 1.0.0, and kohya's name of the base model.

    `edge` is the edge in pixels of the square pictures that the base model was trained on, where it says so.
    """
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": Path(base.name).name,
        **({"modelspec.resolution": f"{edge}x{edge}"} if edge else {}),
        "ss_base_model_version": base_version,
    }


def trained_edge(base: Checkpoint, denoiser: str, downsampling: int) -> int | None:
    """The edge in pixels of the pictures that a base model's network was trained on, by its config; None where it tells none."""
    size = base.config(denoiser).get("sample_size")
    return size * downsampling if isinstance(size, int) else None
