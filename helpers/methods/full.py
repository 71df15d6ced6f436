"""Full fine-tuning: all weights of the denoiser are trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts
from helpers.methods.text_encoders import WEIGHTS_FILE as TEXT_WEIGHTS_FILE
from helpers.methods.text_encoders import name_in_files, train_only
from helpers.protocols import LIVE, Parts, Trainable
from helpers.storage.atomic import atomic_folder, scratch_folder
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily

PIPELINE = "pipeline"  # the exported model folder
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class FullFineTune:
    """Trains the whole denoiser, in float32, or in bfloat16 with an optimizer made for that."""

    facts = Facts(name="full", title="full fine-tune")

    def __init__(self, options: AdapterOptions, family: ModelFamily) -> None:
        self.family = family

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        import torch

        # Half-precision weights lose small updates, unless the optimizer rounds stochastically. Without mixed precision the network's
        # inputs are float32, which bfloat16 weights cannot process.
        return torch.bfloat16 if optimizer == "adamw_bf16" and mixed_precision == "bf16" else torch.float32

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw_bf16" if mixed_precision == "bf16" else "adamw"

    def check(self, outline: Parts) -> None:
        """Nothing to refuse: every network has weights to train."""

    def attach(self, parts: Parts) -> Trainable:
        parts.denoiser.requires_grad_(True).train()
        parameters = dict(parts.denoiser.named_parameters())
        for role, encoder in parts.text_encoders.items():
            parameters |= train_only(encoder, parts.text_weights, role)
        count = sum(parameter.numel() for parameter in parameters.values())
        dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
        description = f"full fine-tune of {count / 1e6:,.1f} M parameters in {dtype}"
        return Trainable(parts.denoiser, parameters, description, parts.denoiser_folder, text_encoders=parts.text_encoders)

    def network(self, trainable: Trainable) -> Any:
        """The module that is trained and saved."""
        return trainable.denoiser

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write a diffusers folder `<role><label>/` (unet, transformer), and one for each trained text encoder."""
        target = folder / f"{trainable.role}{label}"
        target.mkdir(parents=True)
        network = self.network(trainable)
        network.save_config(target)
        tensors = {**network.state_dict(), **trainable.weights_of(trainable.role, weights or {})}
        save_tensors(tensors, target / WEIGHTS_FILE)
        return [target, *(self._save_text(trainable, role, folder / f"{role}{label}", weights) for role in trainable.text_encoders)]

    def _save_text(self, trainable: Trainable, role: str, target: Path, weights: Mapping[str, Tensor] | None) -> Path:
        target.mkdir(parents=True)
        trainable.text_encoders[role].config.save_pretrained(target)
        tensors = {name_in_files(name): tensor for name, tensor in _text_tensors(trainable, role, weights).items()}
        save_tensors(tensors, target / TEXT_WEIGHTS_FILE, {"format": "pt"})
        return target

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(folder / f"{trainable.role}{label}" / WEIGHTS_FILE)
        tensors = {name: stored[name] for name in trainable.weights_of(trainable.role, trainable.parameters)}
        for role in trainable.text_encoders:
            stored = load_file(folder / f"{role}{label}" / TEXT_WEIGHTS_FILE)
            tensors |= {f"{role}.{name}": stored[name_in_files(name)] for name in trainable.weights_of(role, trainable.parameters)}
        return tensors

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write `pipeline/`. With an average it holds the average, and `<role>_live/` folders hold the live weights of each network."""
        written = [folder / PIPELINE]
        with scratch_folder(folder, "export") as aside, atomic_folder(folder / PIPELINE) as pipeline:
            denoiser, *encoders = self.save(trainable, aside, average)
            self.family.export_pipeline(denoiser, schedule, pipeline)
            for encoder in encoders:
                shutil.rmtree(pipeline / encoder.name)
                shutil.copytree(encoder, pipeline / encoder.name)
            self._check_all(pipeline, trainable, average)
        if average is not None:
            with scratch_folder(folder, "export") as aside:
                self.save(trainable, aside)
                self._check_all(aside, trainable, None)
                for role in trainable.modules:
                    written.append(folder / f"{role}{LIVE}")
                    with atomic_folder(written[-1]) as live:
                        shutil.copytree(aside / role, live, dirs_exist_ok=True)
        return written

    def _check_all(self, folder: Path, trainable: Trainable, weights: Mapping[str, Tensor] | None) -> None:
        """Raises RuntimeError unless `folder` holds the config and, bit for bit, the weights of every trained network."""
        check(folder / trainable.role, self.network(trainable), trainable.weights_of(trainable.role, weights or {}))
        for role in trainable.text_encoders:
            _check_text(folder / role, trainable, role, weights)


def _text_tensors(trainable: Trainable, role: str, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A text encoder's tensors, replaced by those of `weights` where it has them."""
    return {**trainable.text_encoders[role].state_dict(), **trainable.weights_of(role, weights or {})}


def _check_text(folder: Path, trainable: Trainable, role: str, weights: Mapping[str, Tensor] | None) -> None:
    import torch

    kind = type(trainable.text_encoders[role])
    found = kind.from_pretrained(folder, local_files_only=True, dtype="auto").state_dict()
    expected = _text_tensors(trainable, role, weights)
    if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name].cpu()) for name in expected):
        raise RuntimeError(f"{folder} does not hold the trained text encoder.")


def check(folder: Path, network: Any, weights: Mapping[str, Tensor] | None) -> None:
    """Raises RuntimeError unless the folder holds the config and, bit for bit, the weights of this network."""
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
        raise RuntimeError(f"{folder} does not hold the trained network.")
