"""Full fine-tuning: every weight of the denoiser moves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts
from helpers.protocols import Parts, Trainable
from helpers.storage.atomic import atomic_folder, scratch_folder
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class FullFineTune:
    """Trains the whole denoiser, in float32 unless the optimiser is made for bfloat16 weights."""

    facts = Facts(name="full", title="full fine-tune")

    def __init__(self, options: AdapterOptions, family: ModelFamily) -> None:
        self.family = family

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        import torch

        # Small updates vanish in half-precision weights, unless the optimiser rounds stochastically; without mixed precision
        # the network is fed float32, which weights in bfloat16 cannot take.
        return torch.bfloat16 if optimizer == "adamw_bf16" and mixed_precision == "bf16" else torch.float32

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw_bf16" if mixed_precision == "bf16" else "adamw"

    def try_on(self, outline: Parts) -> None:
        """Every network has weights that can move."""

    def attach(self, parts: Parts) -> Trainable:
        parts.denoiser.requires_grad_(True).train()
        parameters = dict(parts.denoiser.named_parameters())
        count = sum(parameter.numel() for parameter in parameters.values())
        dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
        return Trainable(parts.denoiser, parameters, f"full fine-tune of {count / 1e6:,.1f} M parameters in {dtype}", parts.denoiser_folder)

    def network(self, trainable: Trainable) -> Any:
        """What is trained, as the module that is saved."""
        return trainable.denoiser

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write `<role><label>/` (unet, transformer) as diffusers does, so that the folder loads by itself."""
        target = folder / f"{trainable.role}{label}"
        target.mkdir(parents=True)
        network = self.network(trainable)
        network.save_config(target)
        tensors = {**network.state_dict(), **(weights or {})}
        save_tensors(tensors, target / WEIGHTS_FILE)
        return [target]

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        from safetensors.torch import load_file

        tensors = load_file(folder / f"{trainable.role}{label}" / WEIGHTS_FILE)
        return {name: tensors[name] for name in trainable.parameters}

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write `pipeline/`, of the average if there is one, with the live denoiser beside it as `<unet|transformer>_live/`."""
        written = [folder / "pipeline"]
        with scratch_folder(folder, "export") as aside, atomic_folder(folder / "pipeline") as pipeline:
            [denoiser] = self.save(trainable, aside, average)
            self.family.export_pipeline(denoiser, schedule, pipeline)
            check(pipeline / trainable.role, self.network(trainable), average)
        if average is not None:
            written.append(folder / f"{trainable.role}_live")
            with scratch_folder(folder, "export") as aside, atomic_folder(written[-1]) as live:
                [denoiser] = self.save(trainable, aside)
                shutil.copytree(denoiser, live, dirs_exist_ok=True)
                check(live, self.network(trainable), None)
        return written


def check(folder: Path, network: Any, weights: Mapping[str, Tensor] | None) -> None:
    """Raises RuntimeError unless the folder describes this network and holds its weights to the bit."""
    import torch
    from safetensors import safe_open

    expected = {**network.state_dict(), **(weights or {})}
    with torch.device("meta"):
        described = type(network).from_config(type(network).load_config(folder)).state_dict()
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        names = set(file.keys())
        same = names == set(expected) == set(described) and all(
            described[name].shape == file.get_tensor(name).shape and torch.equal(file.get_tensor(name), expected[name].cpu())
            for name in names
        )
    if not same:
        raise RuntimeError(f"{folder} does not read back as the network that was trained.")
