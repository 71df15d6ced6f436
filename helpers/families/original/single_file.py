"""A model folder of diffusers written as one .safetensors file, which ComfyUI and other tools open.

The file has Stability AI's layout, the metadata of a model specification, and empty tensors that say what the network predicts: `v_pred`,
and `ztsnr` for zero terminal SNR. Without them other tools take every SDXL for one that predicts the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families.loading.components import weight_files
from helpers.families.loading.file_facts import V_PRED, ZERO_SNR
from helpers.families.loading.folder import read_json
from helpers.storage.atomic import scratch_folder
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}  # of a diffusers scheduler => of modelspec.prediction_type
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
T5_TABLE, T5_COPY = "shared.weight", "encoder.embed_tokens.weight"  # one table under two names, of which a folder may have either


def write_single_file(folder: Path, target: Path, modelspec: Mapping[str, str]) -> Path:
    """Write the model of a diffusers folder as the file `target`, with this metadata. => `target`

    Tensors keep their precision. The file is read back and replaces an existing one only if it holds the same bits; RuntimeError otherwise.
    ModelError for a network that the layout has no names for.
    """
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    tensors = {**_model_tensors(folder), **_markers(schedule)}
    with scratch_folder(target.parent, "single") as aside:
        made = aside / target.name
        save_tensors(tensors, made, {**modelspec, **_prediction(schedule), "format": "pt"})
        _check(made, tensors)
        made.replace(target)
    return target


def modelspec_of_model(described: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a whole model, of a LoRA's without a kind, whose architecture ends with a slash: `stable-diffusion-3/`."""
    kept = {key: value for key, value in described.items() if key.startswith("modelspec.")}
    return {**kept, "modelspec.architecture": kept["modelspec.architecture"].rstrip("/")}


def _model_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from helpers.families.original.single_file_layout import Component, single_file_tensors

    parts = {}
    for part in PARTS:
        files = [path for path in weight_files(folder / part, None) if path.suffix == ".safetensors"]
        if not files:
            continue
        tensors: dict[str, Tensor] = {}
        for path in files:
            tensors |= load_file(path)
        if part == "text_encoder_3" and T5_COPY in tensors:
            tensors.setdefault(T5_TABLE, tensors[T5_COPY].clone())
        parts[part] = Component(read_json(folder / part / "config.json"), tensors)
    try:
        return single_file_tensors(parts)
    except KeyError as error:
        raise ModelError(f"{folder} cannot be written as one file: the layout of such files has no name for {error.args[0]}.") from error


def _markers(schedule: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    marked = {V_PRED: schedule.get("prediction_type") == "v_prediction", ZERO_SNR: bool(schedule.get("rescale_betas_zero_snr"))}
    return {name: torch.empty(0) for name, there in marked.items() if there}


def _prediction(schedule: Mapping[str, Any]) -> dict[str, str]:
    """A schedule of flow matching has no betas, and the specification no word for it."""
    if "beta_schedule" not in schedule:
        return {}
    return {"modelspec.prediction_type": PREDICTIONS[schedule.get("prediction_type", "epsilon")]}


def _check(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError unless a file holds exactly these tensors."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = set(file.keys())
        same = names == expected.keys() and all(
            (found := file.get_tensor(name)).dtype == expected[name].dtype and torch.equal(found, expected[name]) for name in names
        )
    if not same:
        raise RuntimeError(f"{path} does not hold the trained model.")
