"""A base model that is one .safetensors file in Stability AI's layout: made into a folder in diffusers layout, once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.families import folder
from helpers.storage.atomic import atomic_folder

# A tensor that only files of this kind have => the class of diffusers that reads the file. The first that is found counts.
PIPELINE_OF_TENSOR: Mapping[str, str] = {
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLImg2ImgPipeline",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionPipeline",
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": "StableDiffusionPipeline",
}
PARTS = ("model.diffusion_model.", "first_stage_model.")  # U-Net and VAE


def converted(path: Path, config: str | None, cache_dir: Path) -> Path:
    """The folder that a single file was made into; made if it is not there. `config` is --single_file_config.

    Settings and tokenizers are not in such a file: they come from `config`, or from the model on the hub that diffusers takes the file
    for. Raises ModelError when the file is no complete model of a known kind, or these cannot be had.
    """
    if path.suffix != ".safetensors":
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} is no .safetensors file; convert it first, formats that run code are not opened."
        )
    kind = _pipeline_of(path)
    facts = {"weights": folder.WeightsHashes(cache_dir / "weights_hashes.json").of_file(path), "config": config, "pipeline": kind}
    target = cache_dir / "converted" / folder.fingerprint(facts)
    if not (target / "model_index.json").is_file():
        with atomic_folder(target) as aside:
            _convert(path, kind, config, aside)
    return target


def _pipeline_of(path: Path) -> str:
    """By the names of the tensors alone; nothing else of the file is read."""
    names = _tensors(path).keys()
    missing = [part for part in PARTS if not any(name.startswith(part) for name in names)]
    for tensor, pipeline in PIPELINE_OF_TENSOR.items():
        if tensor in names and not missing:
            return pipeline
    raise ModelError(
        f"--pretrained_model_name_or_path: {path} is no complete model of Stable Diffusion 1 or 2, SDXL or its refiner "
        "(U-Net, VAE and text encoder in one file); name a folder in diffusers layout."
    )


def _tensors(path: Path) -> Mapping[str, Any]:
    """The header of a safetensors file. Raises ModelError when there is none, or the file ends before its last tensor does."""
    if folder.is_cut_off(path):
        raise ModelError(f"{path} is cut off, as an interrupted download leaves it, or no safetensors file: fetch the model again.")
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _convert(path: Path, kind: str, config: str | None, target: Path) -> None:
    import diffusers
    import torch

    dtype = torch.float16 if _is_half(path) else torch.float32
    chosen: dict[str, Any] = {"config": config} if config else {}
    try:
        pipeline = getattr(diffusers, kind).from_single_file(str(path), torch_dtype=dtype, **chosen)
    except Exception as error:  # of many libraries, for many reasons: all end here with the remedy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} cannot be made into a folder in diffusers layout ({reason}): its settings and "
            "tokenizers come from the hub, unless --single_file_config names a model folder of the same kind."
        ) from error
    pipeline.save_pretrained(target, safe_serialization=True)


def _is_half(path: Path) -> bool:
    """Whether the U-Net is stored in half precision: what is made of it then takes no more space."""
    return any(name.startswith(PARTS[0]) and entry["dtype"] in ("F16", "BF16") for name, entry in _tensors(path).items())
