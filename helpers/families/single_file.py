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
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "StableDiffusion3Pipeline",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLImg2ImgPipeline",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionPipeline",
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": "StableDiffusionPipeline",
}
PARTS = ("model.diffusion_model.", "first_stage_model.")  # the network and the VAE
# Files of Stable Diffusion 3 come with and without its text encoders; those are found by how names of their tensors begin.
ENCODERS_OF_SD3: Mapping[str, str] = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
T5 = "text_encoder_3"  # may be left out


def converted(path: Path, config: str | None, cache_dir: Path) -> Path:
    """The folder that a single file was made into; made if it is not there. `config` is --single_file_config.

    Settings and tokenizers are not in such a file: they come from `config`, or from the model on the hub that diffusers takes the file
    for. Text encoders that a file of Stable Diffusion 3 lacks come from `config` too; it does without T5 where that has none. Raises
    ModelError when the file is no complete model of a known kind, or these cannot be had.
    """
    if path.suffix != ".safetensors":
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} is no .safetensors file; convert it first, formats that run code are not opened."
        )
    kind = _pipeline_of(path)
    elsewhere = _encoders_elsewhere(path, config) if kind == "StableDiffusion3Pipeline" else {}
    hashes = folder.WeightsHashes(cache_dir / "weights_hashes.json")
    facts: dict[str, Any] = {"weights": hashes.of_file(path), "config": config, "pipeline": kind}
    if elsewhere:
        facts["encoders"] = {part: hashes.of(found) if found else None for part, found in elsewhere.items()}
    target = cache_dir / "converted" / folder.fingerprint(facts)
    if not (target / "model_index.json").is_file():
        with atomic_folder(target) as aside:
            _convert(path, kind, config, elsewhere, aside)
    return target


def _pipeline_of(path: Path) -> str:
    """By the names of the tensors alone; nothing else of the file is read."""
    names = _tensors(path).keys()
    missing = [part for part in PARTS if not any(name.startswith(part) for name in names)]
    for tensor, pipeline in PIPELINE_OF_TENSOR.items():
        if tensor in names and not missing:
            return pipeline
    raise ModelError(
        f"--pretrained_model_name_or_path: {path} is no complete model of Stable Diffusion 1 to 3.5, SDXL or its refiner "
        "(network, VAE and text encoder in one file); name a folder in diffusers layout."
    )


def _encoders_elsewhere(path: Path, config: str | None) -> dict[str, Path | None]:
    """The text encoders that a file of Stable Diffusion 3 lacks => their folders in `config`; None for T5 where there is none.

    Raises ModelError when a CLIP encoder is in neither.
    """
    names = _tensors(path).keys()
    lacking = [part for part, beginning in ENCODERS_OF_SD3.items() if not any(name.startswith(beginning) for name in names)]
    found = {part: Path(config).expanduser() / part if config else None for part in lacking}
    there = {part: place if place and list(place.glob("*.safetensors")) else None for part, place in found.items()}
    absent = [part for part, place in there.items() if place is None and part != T5]
    if absent:
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} is without the text encoders of Stable Diffusion 3 ({' and '.join(absent)} of a "
            "folder in diffusers layout): name a file that brings both CLIP encoders, or with --single_file_config a model folder on "
            "this machine that has them."
        )
    return there


def _tensors(path: Path) -> Mapping[str, Any]:
    """The header of a safetensors file. Raises ModelError when there is none, or the file ends before its last tensor does."""
    if folder.is_cut_off(path):
        raise ModelError(f"{path} is cut off, as an interrupted download leaves it, or no safetensors file: fetch the model again.")
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _convert(path: Path, kind: str, config: str | None, elsewhere: Mapping[str, Path | None], target: Path) -> None:
    import diffusers
    import torch

    dtype = torch.float16 if _is_half(path) else torch.float32
    chosen: dict[str, Any] = {"config": config} if config else {}
    try:
        chosen |= {part: _encoder(part, found, dtype) for part, found in elsewhere.items()}
        if elsewhere.get(T5, Path()) is None:
            chosen["tokenizer_3"] = None
        pipeline = getattr(diffusers, kind).from_single_file(str(path), torch_dtype=dtype, **chosen)
        if getattr(pipeline, T5, None) is not None:
            pipeline.text_encoder_3.tie_weights()  # a table that files hold once, and of which diffusers fills one of two places
    except Exception as error:  # of many libraries, for many reasons: all end here with the remedy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} cannot be made into a folder in diffusers layout ({reason}): its settings and "
            "tokenizers come from the hub, unless --single_file_config names a model folder of the same kind."
        ) from error
    pipeline.save_pretrained(target, safe_serialization=True)


def _encoder(part: str, found: Path | None, dtype: Any) -> Any:
    """A text encoder of Stable Diffusion 3 from its own folder; None where there is none."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    if found is None:
        return None
    return (T5EncoderModel if part == T5 else CLIPTextModelWithProjection).from_pretrained(found, torch_dtype=dtype, local_files_only=True)


def _is_half(path: Path) -> bool:
    """Whether the network is stored in half precision: what is made of it then takes no more space."""
    return any(name.startswith(PARTS[0]) and entry["dtype"] in ("F16", "BF16") for name, entry in _tensors(path).items())
