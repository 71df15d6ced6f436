"""A base model that is one .safetensors file in Stability AI's layout: made into a folder in diffusers layout, once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.families.loading.hashes import WeightsHashes, fingerprint
from helpers.families.loading.integrity import problem_with
from helpers.storage.atomic import atomic_folder
from helpers.storage.memo import Memo

# A tensor that only files of this kind have => the class of diffusers that reads the file. The first that is found counts.
PIPELINE_OF_TENSOR: Mapping[str, str] = {
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "StableDiffusion3Pipeline",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLImg2ImgPipeline",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionPipeline",
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": "StableDiffusionPipeline",
}
PARTS = ("model.diffusion_model.", "first_stage_model.")  # the network and the VAE
# What is in a file => how the names of its tensors begin.
BEGINNINGS: Mapping[str, tuple[str, ...]] = {
    "network": PARTS[:1],
    "vae": PARTS[1:],
    "text_encoders": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
CONTENT_OF_FOLDER: Mapping[str, str] = {
    "unet": "network",
    "transformer": "network",
    "vae": "vae",
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "text_encoders"),
}
# Of weights in a file => the smallest of torch's that holds them exactly and that networks are loaded in.
PRECISIONS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float16", "F8_E5M2": "float16"}
# Files of Stable Diffusion 3 come with and without its text encoders; those are found by how names of their tensors begin.
ENCODERS_OF_SD3: Mapping[str, str] = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
T5 = "text_encoder_3"  # may be left out


def converted(path: Path, config: str | None, cache_dir: Path, with_t5: bool = True) -> Path:
    """The folder that a single file was made into; made if it is not there. `config` is --single_file_config.

    Without `with_t5` a T5 in a file of Stable Diffusion 3, the largest of its parts, is left out: another one is used.

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
    if kind == "StableDiffusion3Pipeline" and not with_t5:
        elsewhere = {**elsewhere, T5: None}
    hashes = WeightsHashes(Memo(cache_dir / "memo"))
    facts: dict[str, Any] = {"weights": hashes.of_file(path), "config": config, "pipeline": kind, "precision": _dtypes(path)}
    if elsewhere:
        facts["encoders"] = {part: hashes.hash_folders(found) if found else None for part, found in elsewhere.items()}
    target = cache_dir / "converted" / fingerprint(facts)
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
    if problem := problem_with(path):
        raise ModelError(f"--pretrained_model_name_or_path: {problem}")
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _convert(path: Path, kind: str, config: str | None, elsewhere: Mapping[str, Path | None], target: Path) -> None:
    import diffusers
    import torch

    dtypes = _dtypes(path)
    together = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else "float32"  # which holds all others exactly
    chosen: dict[str, Any] = {"config": config} if config else {}
    try:
        chosen |= {part: _encoder(part, found) for part, found in elsewhere.items()}
        if elsewhere.get(T5, Path()) is None:
            chosen["tokenizer_3"] = None
        pipeline = getattr(diffusers, kind).from_single_file(str(path), torch_dtype=getattr(torch, together), **chosen)
        if getattr(pipeline, T5, None) is not None:
            pipeline.text_encoder_3.tie_weights()  # a table that files hold once, and of which diffusers fills one of two places
    except Exception as error:  # of many libraries, for many reasons: all end here with the remedy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} cannot be made into a folder in diffusers layout ({reason}): its settings and "
            "tokenizers come from the hub, unless --single_file_config names a model folder of the same kind."
        ) from error
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name not in elsewhere:
            own = dtypes.get(CONTENT_OF_FOLDER.get(name, ""), together)
            torch.nn.Module.to(part, getattr(torch, own))  # not the method of diffusers, which would warn
    pipeline.save_pretrained(target, safe_serialization=True)


def _encoder(part: str, found: Path | None) -> Any:
    """A text encoder of Stable Diffusion 3 from its own folder, in the precision it has there; None where there is none."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    if found is None:
        return None
    return (T5EncoderModel if part == T5 else CLIPTextModelWithProjection).from_pretrained(found, dtype="auto", local_files_only=True)


def _dtypes(path: Path) -> dict[str, str]:
    """The precision in which each content of a file is kept: its own, or float32 where it has several."""
    found: dict[str, set[str]] = {}
    for name, entry in _tensors(path).items():
        for content, beginnings in BEGINNINGS.items():
            if name.startswith(beginnings) and entry["dtype"] in PRECISIONS:
                found.setdefault(content, set()).add(PRECISIONS[entry["dtype"]])
    return {content: dtypes.pop() if len(dtypes) == 1 else "float32" for content, dtypes in found.items()}
