"""What a base model in one .safetensors file says of itself: marker tensors and metadata in its header. No tensor is read.

- Tensors without elements, `v_pred` and `ztsnr`: velocity prediction and zero terminal SNR. ComfyUI, Forge and reForge go by them
  (https://github.com/AUTOMATIC1111/stable-diffusion-webui/pull/16567).
- `modelspec.*` metadata: Stability AI's model specification, https://github.com/Stability-AI/ModelSpec. `modelspec.prediction_type` is
  "epsilon" or "v"; kohya's and other trainers write "v_prediction" too.
- `ss_v_parameterization` and `ss_zero_terminal_snr`: metadata of kohya's scripts.
- Tensors `edm_mean` and `edm_std` (Playground 2.5), `edm_vpred.sigma_max` and `edm_vpred.sigma_min` (CosXL): EDM, another way to train.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.foreign_json import parse_json
from helpers.storage.atomic import write_json

FACTS_FILE = "single_file.json"  # in the folder that the file was converted to
V_PRED, ZERO_SNR = "v_pred", "ztsnr"  # names of the marker tensors
PREDICTIONS: Mapping[str, str] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_pred": "v_prediction",
    "v_prediction": "v_prediction",
    "sample": "sample",
}
FLOW = ("flow", "flow_matching", "rectified_flow", "rf", "flow_prediction")  # what files of Stable Diffusion 3 may say
EDM_TENSORS = re.compile(r"edm_(mean|std)|edm_vpred\.|edm_eps\.")
EDM_WORDS = re.compile(r"\bedm\b|\bcos_?xl\b|\bplayground[- _]?v?2\.5\b", re.IGNORECASE)
EDM_KEYS = ("modelspec.prediction_type", "modelspec.architecture", "modelspec.title", "modelspec.implementation")
# How modelspec.architecture begins => the diffusers pipelines that such a file is for. The first that fits counts.
ARCHITECTURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stable-diffusion-xl-v1-refiner", ("StableDiffusionXLImg2ImgPipeline",)),
    ("stable-diffusion-xl", ("StableDiffusionXLPipeline",)),
    ("stable-diffusion-v3", ("StableDiffusion3Pipeline",)),
    ("stable-diffusion-3", ("StableDiffusion3Pipeline",)),
    ("stable-diffusion-v", ("StableDiffusionPipeline",)),
    ("stable-diffusion", ("StableDiffusionPipeline",)),
)
# Tensors that say nothing beyond what is read otherwise: the noise schedule (of which the config has the betas), position counters,
# CLIP's temperature and mask, the loss network of a VAE, and layers of OpenCLIP that Stable Diffusion does not use.
NOT_NEEDED = re.compile(
    r"(model_ema\.(decay|num_updates))|betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights|logvar"
    r"|denoiser\.(sigmas|log_sigmas)|scale_factor|global_step|.*\.position_ids|.*\.logit_scale|.*\.attn_mask|first_stage_model\.loss\..*"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.\d+\..*|visual\..*)|v_pred|ztsnr|scaled_fp8"
)
SCALED = re.compile(r"scaled_fp8|.*\.(scale_weight|weight_scale|scale_input|quant_map|absmax|quant_state\..*|SCB|comfy_quant)")


@dataclass(frozen=True)
class FileFacts:
    """What a file says of itself; None where it says nothing. `notes` are sentences for the start of a run."""

    prediction_type: str | None = None  # "epsilon", "v_prediction" or "sample"
    zero_snr: bool | None = None
    said_by: str = ""  # where: "its tensor v_pred"
    notes: tuple[str, ...] = field(default=())

    def with_notes(self, notes: Iterable[str]) -> FileFacts:
        return FileFacts(self.prediction_type, self.zero_snr, self.said_by, (*self.notes, *notes))

    def write(self, folder: Path) -> None:
        write_json(folder / FACTS_FILE, {**asdict(self), "notes": list(self.notes)})

    def contradicted_by(self, file: str, prediction_type: str | None, zero_snr: bool | None) -> Iterable[str]:
        """One sentence for each setting that says otherwise than the file; None is a setting that was not set."""
        for flag, asked, said in (
            ("prediction_type", prediction_type, self.prediction_type),
            ("rescale_betas_zero_snr", zero_snr, self.zero_snr),
        ):
            if asked is not None and said is not None and asked != said:
                value, own = (str(item).lower() for item in (asked, said))
                yield (
                    f"warning: --{flag}={value} contradicts {file}, which says {own} ({self.said_by}): the model has to learn anew what it "
                    "predicts. Remove the flag unless you mean that."
                )


def read_facts(folder: Path) -> FileFacts | None:
    """The facts that `FileFacts.write` left in a converted folder; None for a folder that was no single file."""
    path = folder / FACTS_FILE
    if not path.is_file():
        return None
    content = parse_json(path.read_text(encoding="utf-8"))
    return FileFacts(content["prediction_type"], content["zero_snr"], content["said_by"], tuple(content["notes"]))


def facts_of(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str], pipeline: str) -> FileFacts:
    """What a file says, by the header with the entries of its tensors. `pipeline` is the diffusers class that reads it.

    Raises ModelError for EDM models and quantized weights, and for metadata that names another kind of model than Stable Diffusion.
    """
    _refuse_edm(path, header, metadata)
    refuse_quantized(path, header)
    flow = pipeline == "StableDiffusion3Pipeline"
    said, notes = _predictions(path, header, metadata, flow)
    zero = _zero_snr(header, metadata)
    if not said and not zero:
        return FileFacts(notes=(*notes, *_architecture(path, metadata, pipeline)))
    prediction = next(iter(said.values()), None)
    sources = " and ".join((*([next(iter(said))] if said else []), *zero))
    means = [prediction or "", "zero terminal SNR" if zero else ""]
    notes.insert(0, f"{path.name} says: {' with '.join(filter(None, means))} ({sources})")
    for source, other in said.items():
        if other != prediction:
            notes.append(f"warning: {path.name} contradicts itself: {source} says {other}; {next(iter(said))} counts")
    return FileFacts(prediction, True if zero else None, sources, (*notes, *_architecture(path, metadata, pipeline)))


def _predictions(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str], flow: bool) -> tuple[dict[str, str], list[str]]:
    """Source => prediction type, the strongest source first; and notes about values that are not understood."""
    found: dict[str, str] = {}
    notes: list[str] = []
    if V_PRED in header:
        found["its tensor v_pred"] = "v_prediction"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = metadata.get(key, "").strip()
        word = re.sub(r"[- ]", "_", value.lower())
        if word in PREDICTIONS:
            found[f"its metadata {key}"] = PREDICTIONS[word]
        elif word in FLOW and not flow:
            raise ModelError(
                f"--pretrained_model_name_or_path: {path} was trained by flow matching ({key} is {value!r}), which is not the method of "
                "this kind of model here; name another base model."
            )
        elif word and not (flow and word in FLOW):
            notes.append(f"warning: {path.name} has {key} {value!r}, which is not understood; set --prediction_type")
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        found["its metadata ss_v_parameterization"] = "v_prediction"
    version_2 = re.match(r"stable-diffusion-v2-(512|768-v)", metadata.get("modelspec.architecture", ""))
    if version_2:
        found["its metadata modelspec.architecture"] = "epsilon" if version_2[1] == "512" else "v_prediction"
    return found, notes


def _zero_snr(header: Mapping[str, Any], metadata: Mapping[str, str]) -> list[str]:
    """Where the file says that its schedule ends in pure noise."""
    sources = ["its tensor ztsnr"] if ZERO_SNR in header else []
    for key in ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr"):
        if metadata.get(key, "").lower() in ("true", "1"):
            sources.append(f"its metadata {key}")
    return sources


def _refuse_edm(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    tensor = next((name for name in header if EDM_TENSORS.match(name)), None)
    key = next((key for key in EDM_KEYS if EDM_WORDS.search(metadata.get(key, ""))), None)
    if tensor or key:
        mark = f"its tensor {tensor}" if tensor else f"its metadata {key} is {metadata[key or '']!r}"
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} is an EDM model ({mark}), which is trained on continuous noise levels; that is not "
            "possible here. Name a base model that predicts epsilon or v_prediction."
        )


def refuse_quantized(path: Path, header: Mapping[str, Any]) -> None:
    """Raises ModelError for a file whose weights are numbers times scales of their own."""
    if scale := next((name for name in header if SCALED.fullmatch(name)), None):
        raise ModelError(
            f"--pretrained_model_name_or_path: {path} holds quantized weights with scales of their own ({scale}); name the file in fp16, "
            "bf16 or fp32. --base_quantization quantizes it for training."
        )


def _architecture(path: Path, metadata: Mapping[str, str], pipeline: str) -> Iterable[str]:
    """A warning where the metadata names another family than the tensors."""
    stated = metadata.get("modelspec.architecture", "")
    kinds = next((kinds for start, kinds in ARCHITECTURES if stated.lower().startswith(start)), None)
    if stated and (kinds is None or pipeline not in kinds):
        yield f"warning: {path.name} has modelspec.architecture {stated!r}, but its tensors are those of a {pipeline}, which counts"


def resolution_note(path: Path, metadata: Mapping[str, str], edge: int | None) -> Iterable[str]:
    """A warning where the metadata names another size of training images than the config, whose `edge` is in pixels."""
    stated = metadata.get("modelspec.resolution", "")
    if stated and edge and stated.replace(" ", "").lower() != f"{edge}x{edge}":
        yield f"warning: {path.name} has modelspec.resolution {stated}, but its config is for {edge}x{edge}: choose --resolution yourself"


def unread_note(path: Path, held: Iterable[str], read: Iterable[str]) -> Iterable[str]:
    """A sentence that names the tensors of a file that its conversion leaves out; `read` are those that it needs."""
    unread = sorted(name for name in set(held) - set(read) if not NOT_NEEDED.fullmatch(name))
    average = [name for name in unread if name.startswith("model_ema.")]
    if average:
        yield f"{path.name} also holds an EMA of its network ({len(average):,} tensors, model_ema...): the other weights are used"
    if others := [name for name in unread if not name.startswith("model_ema.")]:
        few = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        yield f"warning: {path.name} holds tensors that are not used: {few}"
