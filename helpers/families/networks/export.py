"""Exports: a complete model folder with a trained network, and the metadata of a LoRA file."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.components import weight_files
from helpers.families.loading.folder import read_json
from helpers.families.text.tokenizer_files import complete_clip_tokenizer
from helpers.storage.atomic import write_json

# Names of weight files, which are copied one by one: only the files that are loaded.
WEIGHTS = ("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index*.json", "*.msgpack", "*.onnx*", "*.ckpt", "*.h5")

Component = Path | Callable[[Path], None]  # a folder, or a function that writes one


def write_pipeline(
    base: BaseModel,
    replaced: Mapping[str, Component],
    schedule: Mapping[str, Any],
    target: Path,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write a complete diffusers folder: the base model with the components in `replaced` and this noise schedule.

    The schedule's `_class_name` becomes the pipeline's scheduler. Of the other components, only the files that are loaded are copied.
    `classes` are [library, class] of components by name, where the base model's model_index.json has others or none.
    """
    import diffusers

    sampler = schedule.get("_class_name", "EulerDiscreteScheduler")
    index = {**base.index, **(classes or {}), "scheduler": ["diffusers", sampler]}
    for component in _components(index):
        source = replaced.get(component, base.folder / component)
        if component == "scheduler":
            getattr(diffusers, sampler).from_config(dict(schedule)).save_pretrained(target / component)
        elif callable(source):
            source(target / component)
        elif _can_be_loaded(source, base.variant):
            copy_component(source, base.variant, target / component)
        else:
            index[component] = [None, None]  # listed but absent, as the safety checker in many copies of models
        if component.startswith("tokenizer"):
            complete_clip_tokenizer(target / component)
    write_json(target / "model_index.json", index)


def _can_be_loaded(source: Path, variant: str | None) -> bool:
    """Whether a component exists, and its weights, if it has any, are in a format that is loaded."""
    names = [path.name for path in source.iterdir()] if source.is_dir() else []
    has_weights = any(fnmatch.fnmatch(name, pattern) for name in names for pattern in WEIGHTS)
    return bool(weight_files(source, variant)) if has_weights else source.is_dir()


def copy_component(source: Path, variant: str | None, target: Path) -> None:
    """Copy a component with the weights that are loaded (the variant's if it has them), without those in other precisions or formats."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*WEIGHTS))
    copy_weights(weight_files(source, variant), variant, target)


def copy_weights(files: Sequence[Path], variant: str | None, target: Path) -> None:
    """Copy weight files under names without the variant, also in their index, so that they load by default."""

    def plain(name: str) -> str:
        return name.replace(f".{variant}", "") if variant else name

    for path in files:
        if path.suffix == ".json":
            index = read_json(path)
            shards = {tensor: plain(file) for tensor, file in index["weight_map"].items()}
            write_json(target / plain(path.name), {**index, "weight_map": shards})
        else:
            shutil.copyfile(path, target / plain(path.name))


def _components(index: Mapping[str, Any]) -> list[str]:
    """The names in a model_index.json that have a folder: those with [library, class], not [null, null]."""
    return [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0] is not None]


def modelspec(base: BaseModel, architecture: str, implementation: str, base_version: str, edge: int | None) -> dict[str, str]:
    """Metadata of a LoRA file: `modelspec.*` of Stability AI's model specification 1.0.0, and kohya's name of the base model.

    `edge` is the edge, in pixels, of the square images that the base model was trained on, if its config says so.
    """
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": Path(base.name).name,
        **({"modelspec.resolution": f"{edge}x{edge}"} if edge else {}),
        "ss_base_model_version": base_version,
    }


def trained_edge(base: BaseModel, denoiser: str, downsampling: int) -> int | None:
    """The edge, in pixels, of the images that a base model's network was trained on. None if its config does not say."""
    size = base.config(denoiser).get("sample_size")
    return size * downsampling if isinstance(size, int) else None
