"""A transformer of FLUX.1 in one file of Black Forest Labs' layout (flux1-dev.safetensors): made into a folder in diffusers layout.

diffusers' own converter has the sizes of the published networks written in, and downloads the other parts of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families.loading.folder import model_index, read_settings
from helpers.families.original.flux_names import flux_names
from helpers.protocols import FusedPart, KohyaName, SwappedHalves
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NETWORK = "model.diffusion_model."  # how names begin in files that hold more than the network
GUIDANCE = "guidance_in.in_layer.weight"  # in files of dev
WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(path: Path, header: Mapping[str, Any], parts: Path, target: Path) -> Iterable[str]:
    """Write the model into `target`: the network from the file, everything else from the model folder `parts`. => notes for the run

    Raises ModelError where the file is no complete network of the kind that `parts` is (dev or schnell).
    """
    config = read_settings(parts / "transformer" / "config.json")
    prefix = NETWORK if any(name.startswith(NETWORK) for name in header) else ""
    _require_same_kind(path, prefix + GUIDANCE in header, config, parts)
    for name, value in model_index(parts).items():
        if isinstance(value, list) and value[0] and name != "transformer" and (parts / name).is_dir():
            shutil.copytree(parts / name, target / name, dirs_exist_ok=True)
    (target / "transformer").mkdir(parents=True)
    for file in ("model_index.json", "transformer/config.json"):
        shutil.copyfile(parts / file, target / file)
    tensors = dict(read_network(path, prefix, flux_names(config), _shapes(config)))
    save_tensors(tensors, target / "transformer" / WEIGHTS)
    yield f"{path.name} is the network; the VAE, the text encoders and the schedule are those of {parts}"
    if unused := [name for name in header if not name.startswith(prefix)]:
        yield f"warning: {path.name} holds tensors that are not used: {unused[0]} and {len(unused) - 1:,} more"


def read_network(path: Path, prefix: str, names: Mapping[str, KohyaName], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these shapes, by diffusers' names. Raises ModelError for one that the file lacks, or has in another shape."""
    import torch
    from safetensors import SafetensorError, safe_open

    with safe_open(path, "pt") as file:
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            original = names[module]
            layer = original if isinstance(original, str) else original.layer
            stored = f"{prefix}{layer}.{'scale' if layer.endswith('_norm') else kind}"
            try:
                tensor = _part(file, stored, original)
            except SafetensorError as error:
                raise ModelError(f"--pretrained_model_name_or_path: {path} lacks {stored}: it is no complete network of FLUX.1.") from error
            if tensor.shape != shape:
                raise ModelError(
                    f"--pretrained_model_name_or_path: {stored} in {path} has the shape {tuple(tensor.shape)} instead of {tuple(shape)}: "
                    "it is not the network of --single_file_config. One that gets more than noise and text cannot be trained."
                )
            yield name, tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor


def _part(file: Any, stored: str, original: KohyaName) -> Tensor:
    """A tensor of the file, or its rows, or with its halves swapped."""
    import torch

    if isinstance(original, FusedPart):
        first = sum(original.rows[: original.index])
        rows: Tensor = file.get_slice(stored)[first : first + original.rows[original.index]]
        return rows
    tensor: Tensor = file.get_tensor(stored)
    return torch.cat(tensor.chunk(2)[::-1]) if isinstance(original, SwappedHalves) else tensor


def _shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shapes of all tensors of the network, by name."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network: Any = FluxTransformer2DModel.from_config(dict(config))
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _require_same_kind(path: Path, is_dev: bool, config: Mapping[str, Any], parts: Path) -> None:
    if is_dev != bool(config["guidance_embeds"]):
        kinds = ("dev", "schnell") if is_dev else ("schnell", "dev")
        raise ModelError(
            f"--single_file_config: {parts} is a model of FLUX.1 {kinds[1]}, and {path} is the network of one of FLUX.1 {kinds[0]}; "
            f"name a folder of FLUX.1 {kinds[0]}."
        )
