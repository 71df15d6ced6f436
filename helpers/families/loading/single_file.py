"""A base model in one .safetensors file in Stability AI's layout, which is converted to a folder in diffusers layout once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families import family_facts
from helpers.families.loading.components import silence_bars
from helpers.families.loading.file_facts import FileFacts, facts_of, refuse_quantized, resolution_note, unread_note
from helpers.families.loading.finite import require_finite
from helpers.families.loading.folder import read_json
from helpers.families.loading.hashes import WeightsHashes, fingerprint
from helpers.families.loading.integrity import problem_with
from helpers.foreign_json import parse_json
from helpers.registry import Registry
from helpers.storage.atomic import atomic_folder, write_json
from helpers.storage.memo import Memo

if TYPE_CHECKING:
    from helpers.config.facts import FamilyFacts

# A tensor that only files of this kind have => the class of diffusers that reads the file. The first that is found counts.
PIPELINE_OF_TENSOR: Mapping[str, str] = {
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "StableDiffusion3Pipeline",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionXLImg2ImgPipeline",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": "StableDiffusionPipeline",
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": "StableDiffusionPipeline",
}
SD3 = "StableDiffusion3Pipeline"
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"  # (out, in, 3, 3) of a U-Net: its inputs tell what else it is given
OTHER_INPUTS = {9: "for inpainting", 8: "for editing images by instructions", 5: "that is given depth"}
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
    """The folder that a single file is converted to, unless that was done before. `config` is --single_file_config.

    Such a file has no configs and tokenizers: they are those of `config`, or of the model on the hub that diffusers recognizes in the
    file. Text encoders that a file of Stable Diffusion 3 does not contain are taken from `config` too; T5 may be missing in both. Without
    `with_t5`, the file's T5, its largest part, is not converted, because another one is used.
    Raises ModelError if the file is not a complete model of a known kind, or the other parts cannot be found.
    """
    if path.suffix.lower() != ".safetensors":
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} is no .safetensors file; convert it first, formats that run code are not opened."
        )
    header, metadata = _header(path)
    converting = (facts for facts in family_facts().values() if facts.single_file and header.keys() & set(facts.single_file.tensors))
    if family := next(converting, None):
        return _converted_by_family(path, header, family, config, cache_dir)
    kind = _pipeline_of(path, header)
    facts = facts_of(path, header, metadata, kind)
    memo = Memo(cache_dir / "memo")
    require_finite([path], memo)
    elsewhere = _encoders_elsewhere(path, header, config) if kind == SD3 else {}
    if kind == SD3 and not with_t5:
        elsewhere = {**elsewhere, T5: None}
    hashes = WeightsHashes(memo)
    known: dict[str, Any] = {"weights": hashes.of_file(path), "config": config, "pipeline": kind, "precision": _dtypes(header)}
    known["facts"] = [facts.prediction_type, facts.zero_snr, facts.notes]
    if elsewhere:
        known["encoders"] = {part: hashes.hash_folders(found) if found else None for part, found in elsewhere.items()}
    target = cache_dir / "converted" / fingerprint(known)
    if not (target / "model_index.json").is_file():
        with atomic_folder(target) as aside:
            _convert(path, header, kind, config, elsewhere, aside)
            _take_prediction(aside, kind, facts)
            facts.with_notes(_compare(path, header, metadata, kind, facts, aside)).write(aside)
    return target


def _converted_by_family(path: Path, header: Mapping[str, Any], family: FamilyFacts, config: str | None, cache_dir: Path) -> Path:
    """The same for a file that its family converts. ModelError unless `config` is a folder with the other parts of a model."""
    refuse_quantized(path, header)
    parts = Path(config).expanduser() if config else None
    if parts is None or not parts.is_dir():
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} holds the network of {family.title} alone: name with --single_file_config a model "
            "folder on this machine, in diffusers layout, which has the VAE, the text encoders and their tokenizers."
        )
    memo = Memo(cache_dir / "memo")
    require_finite([path], memo)
    hashes = WeightsHashes(memo)
    target = cache_dir / "converted" / fingerprint({"weights": hashes.of_file(path), "parts": hashes.hash_folders(parts)})
    if not (target / "model_index.json").is_file():
        assert family.single_file
        convert = Registry[Callable[..., Iterable[str]]]({"convert": family.single_file.convert})["convert"]
        with atomic_folder(target) as aside:
            FileFacts(notes=tuple(convert(path, header, parts, aside))).write(aside)
    return target


def _pipeline_of(path: Path, header: Mapping[str, Any]) -> str:
    """By the names of the tensors, and the inputs of the network. Raises ModelError for anything but a whole text-to-image model."""
    missing = [part for part in PARTS if not any(name.startswith(part) for name in header)]
    found = next((pipeline for tensor, pipeline in PIPELINE_OF_TENSOR.items() if tensor in header), None)
    if found is None or missing:
        raise ModelError(f"--pretrained_model_name_or_path: {path} {_other_content(header)}.")
    inputs = header[FIRST_LAYER]["shape"][1] if FIRST_LAYER in header else 4
    if inputs in OTHER_INPUTS:
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} is a model {OTHER_INPUTS[inputs]}: its network reads {inputs} channels instead of 4, "
            "and such a model cannot be trained here. Name the text-to-image model that it was made of."
        )
    return found


def _other_content(header: Mapping[str, Any]) -> str:
    """What a file is that is no whole model, and what to do about it."""
    names = list(header)

    def has(*marks: str) -> bool:
        return any(mark in name for name in names for mark in marks)

    if has("lora_down", "lora_A.", "lora_up", "lora.down", "hada_w1", "lokr_w"):
        return "is no complete model but a LoRA: name its base model here, and the file with --init_lora"
    if has("control_model.", "controlnet_cond_embedding", "input_hint_block"):
        return "is no complete model but a ControlNet: name the base model here, and see documentation/CONTROLNET.md"
    if has("emb_params", "string_to_param", "clip_l\0"):
        return "is no complete model but an embedding (textual inversion): name a base model"
    lacks = [part for part, beginnings in BEGINNINGS.items() if not any(name.startswith(beginnings) for name in names)]
    if len(lacks) < len(BEGINNINGS):
        words = {"network": "network (model.diffusion_model...)", "vae": "VAE (first_stage_model...)", "text_encoders": "text encoder"}
        part = " and no ".join(words[name] for name in lacks)
        if not lacks:
            return "is no complete model of Stable Diffusion 1 to 3.5, SDXL or its refiner: its text encoder is of another kind"
        return f"is no complete model: it has no {part}. Name a file with all parts, or a folder in diffusers layout"
    if has("double_blocks.", "joint_blocks.", "input_blocks.", "transformer_blocks.", "down_blocks."):
        return "is no complete model but a network alone, without VAE and text encoder: name a folder in diffusers layout"
    if has("decoder.conv_in", "decoder.mid"):
        return "is no complete model but a VAE: name a base model here; --pretrained_vae_model_name_or_path takes another VAE's folder"
    if has("text_model.encoder", "encoder.block."):
        return "is no complete model but a text encoder: name a base model"
    return (
        "is no complete model of Stable Diffusion 1 to 3.5, SDXL or its refiner (network, VAE and text encoder in one file); name a folder "
        "in diffusers layout"
    )


def _take_prediction(folder: Path, kind: str, facts: FileFacts) -> None:
    """Write what the file says of its prediction into the noise schedule of the converted model, which comes from another model."""
    from helpers.families.sd3 import DIFFUSION_SCHEDULE

    path = folder / "scheduler" / "scheduler_config.json"
    schedule = read_json(path)
    if kind == SD3 and facts.prediction_type == "v_prediction":
        schedule = {"_class_name": "DDPMScheduler", **DIFFUSION_SCHEDULE, "rescale_betas_zero_snr": bool(facts.zero_snr)}
    elif kind != SD3 and facts.prediction_type:
        schedule["prediction_type"] = facts.prediction_type
    if kind != SD3 and facts.zero_snr:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # from the last timestep on, which is pure noise
    write_json(path, schedule)


def _compare(
    path: Path, header: Mapping[str, Any], metadata: Mapping[str, str], kind: str, facts: FileFacts, folder: Path
) -> Iterator[str]:
    """What the conversion did not take over from the file, one sentence each."""
    network = "transformer" if kind == SD3 else "unet"
    if kind != SD3 and facts.prediction_type is None:
        says = read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
        yield f"{path.name} does not say what it predicts: {says} by its config; --prediction_type says otherwise"
    vae, built = (read_json(folder / part / "config.json") for part in ("vae", network))
    size = built.get("sample_size")
    edge = size * 2 ** (len(vae["block_out_channels"]) - 1) if isinstance(size, int) else None
    yield from resolution_note(path, metadata, edge)
    yield from unread_note(path, header, _outline(folder))
    if any(entry["dtype"] == "F64" for entry in header.values()):
        yield f"{path.name} holds float64 weights, which are used in float32"


def _outline(folder: Path) -> set[str]:
    """The names that the tensors of a converted model have in a single file."""
    import torch
    from safetensors import safe_open

    from helpers.families.original.single_file_layout import Component, single_file_tensors

    parts = {}
    for component in sorted(folder.iterdir()):
        tensors: dict[str, Any] = {}
        for file in component.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    tensors[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")
        if tensors:
            parts[component.name] = Component(read_json(component / "config.json"), tensors)
    return set(single_file_tensors(parts))


def _encoders_elsewhere(path: Path, header: Mapping[str, Any], config: str | None) -> dict[str, Path | None]:
    """The text encoders that a file of Stable Diffusion 3 lacks => their folders in `config`; None for T5 where there is none.

    Raises ModelError when a CLIP encoder is in neither.
    """
    lacking = [part for part, beginning in ENCODERS_OF_SD3.items() if not any(name.startswith(beginning) for name in header)]
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


def _header(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The entries of the tensors, and the metadata. Raises ModelError when there is no header, or the file ends too early."""
    if problem := problem_with(path):
        raise ModelError(f"--pretrained_model_name_or_path: {problem}")
    with path.open("rb") as stream:
        header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = header.pop("__metadata__", {})
    return header, metadata


def _convert(
    path: Path, header: Mapping[str, Any], kind: str, config: str | None, elsewhere: Mapping[str, Path | None], target: Path
) -> None:
    import diffusers
    import torch

    silence_bars()
    dtypes = _dtypes(header)
    together = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else "float32"  # which holds all others exactly
    chosen: dict[str, Any] = {"config": config} if config else {}
    try:
        chosen |= {part: _encoder(part, found) for part, found in elsewhere.items()}
        if elsewhere.get(T5, Path()) is None:
            chosen["tokenizer_3"] = None
        with _lower_case(path) as named:
            pipeline = getattr(diffusers, kind).from_single_file(str(named), torch_dtype=getattr(torch, together), **chosen)
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


@contextmanager
def _lower_case(path: Path) -> Iterator[Path]:
    """A path that ends with .safetensors in small letters: diffusers takes any other file for a pickle."""
    if path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"{path.stem}.safetensors"
        link.symlink_to(path.resolve())
        yield link


def _dtypes(header: Mapping[str, Any]) -> dict[str, str]:
    """The precision in which each content of a file is kept: its own, or float32 where it has several."""
    found: dict[str, set[str]] = {}
    for name, entry in header.items():
        for content, beginnings in BEGINNINGS.items():
            if name.startswith(beginnings) and entry["dtype"] in PRECISIONS:
                found.setdefault(content, set()).add(PRECISIONS[entry["dtype"]])
    return {content: dtypes.pop() if len(dtypes) == 1 else "float32" for content, dtypes in found.items()}
