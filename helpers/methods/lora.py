"""Low-rank adaptation (Hu et al., 2021): small matrices beside the frozen layers move, by peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts
from helpers.errors import ConfigError
from helpers.methods.peft_layout import write_adapter
from helpers.protocols import Parts, Trainable
from helpers.storage.atomic import atomic_folder, scratch_folder, write_file
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily

ADAPTER = "default"
WEIGHTS_NAME = "pytorch_lora_weights"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha


class Lora:
    """Trains float32 adapter matrices beside frozen weights, and writes them in the layouts other tools load."""

    facts = Facts(name="lora", title="LoRA", defaults={"learning_rate": 1e-4})  # the declared default is for whole networks

    def __init__(self, options: AdapterOptions, family: ModelFamily) -> None:
        self.options = options
        self.family = family
        self.targets = options.lora_targets or family.lora_targets

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw"  # the adapter's weights are float32 in every precision

    def attach(self, parts: Parts) -> Trainable:
        import torch
        from peft import inject_adapter_in_model

        denoiser = parts.denoiser
        denoiser.requires_grad_(False)
        total = sum(parameter.numel() for parameter in denoiser.parameters())
        try:
            inject_adapter_in_model(self._config(), denoiser, ADAPTER)  # not every network of diffusers has its `add_adapter`
        except ValueError as error:
            raise ConfigError(f"--lora_targets={','.join(self.targets)} fits no layer of this model: {error}") from error
        denoiser.train()
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                # The adapter's masters stay float32: updates of 1e-6 to weights of 1e-2 are lost in half precision.
                parameter.data = parameter.data.to(torch.float32)
                parameters[name] = parameter
        count = sum(parameter.numel() for parameter in parameters.values())
        description = f"LoRA rank {self.options.lora_rank}, {count / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters"
        return Trainable(denoiser, parameters, description, parts.denoiser_folder)

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write the diffusers layout, and beside it the kohya layout or, for a family that has none, peft's. All are read back."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._adapter_tensors(trainable, weights or trainable.parameters)
        metadata = {f"{trainable.role}.{key}": value for key, value in self._metadata(trainable).items()}
        path = folder / f"{WEIGHTS_NAME}{label}.safetensors"
        header = {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
        save_tensors({f"{trainable.role}.{name}": tensor for name, tensor in tensors.items()}, path, header)
        written = [path]
        if kohya := self._kohya(tensors):
            path = folder / f"{WEIGHTS_NAME}{label}.kohya.safetensors"
            save_tensors(kohya, path, self._kohya_metadata())
            written.append(path)
        for path in written:
            self._check(path, tensors)
        if not kohya:
            written.append(write_adapter(folder / f"{WEIGHTS_NAME}{label}.peft", tensors, self._metadata(trainable)))
        return written

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(folder / f"{WEIGHTS_NAME}{label}.safetensors")
        return {name: stored[f"{trainable.role}.{_public_name(name)}"] for name in trainable.parameters}

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write the LoRA files, of the average if there is one, with the live weights beside them as `..._live`."""
        with scratch_folder(folder, "lora") as aside:
            files = self.save(trainable, aside, average)
            if average is not None:
                files += self.save(trainable, aside, label="_live")
            for file in files:
                _publish(file, folder / file.name)
        return [folder / file.name for file in files]

    def _config(self):  # type: ignore[no-untyped-def]  # peft is imported late
        from peft import LoraConfig

        targets: str | list[str] = list(self.targets)
        if len(self.targets) == 1 and any(mark in self.targets[0] for mark in "*+?[(|^$\\"):
            targets = self.targets[0]  # peft reads a string as a regular expression over the whole module name
        return LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=self.options.lora_alpha,
            lora_dropout=self.options.lora_dropout,
            init_lora_weights="gaussian" if self.options.lora_init_type == "gaussian" else True,
            target_modules=targets,
        )

    def _adapter_tensors(self, trainable: Trainable, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_public_name(name): weights[name].detach().float() for name in trainable.parameters}

    def _metadata(self, trainable: Trainable) -> dict[str, object]:
        """Rank, alpha and targets as peft describes them: without these a loader takes alpha to be the rank.

        Dropout is for training. diffusers would switch it on again for whoever loads the file, in networks left in training mode.
        """
        config = {**trainable.denoiser.peft_config[ADAPTER].to_dict(), "lora_dropout": 0.0, "inference_mode": True}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items() if _plain(value)}

    def _check(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError unless diffusers reads from the file just the matrices that were trained, scaled as they were."""
        import torch

        found, alphas = self.family.read_lora(path)
        wrong = [
            name for name in {**found, **tensors} if name not in found or name not in tensors or not torch.equal(found[name], tensors[name])
        ]
        if wrong or set(alphas) != {float(self.options.lora_alpha)}:
            raise RuntimeError(
                f"{path} does not read back as it was trained: {len(wrong)} of {len(tensors)} matrices differ "
                f"({', '.join(sorted(wrong)[:3])}), alpha is {sorted(set(alphas))} for {self.options.lora_alpha}."
            )

    def _kohya(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        kohya: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            module, side = name.rsplit(".lora_", 1)
            renamed = self.family.kohya_name(module)
            if renamed is None:
                return {}
            kohya[f"{renamed}.{'lora_down' if side.startswith('A') else 'lora_up'}.weight"] = tensor
            kohya[f"{renamed}.alpha"] = torch.tensor(float(self.options.lora_alpha))
        return kohya

    def _kohya_metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.options.lora_rank),
            "ss_network_alpha": str(self.options.lora_alpha),
            **self.family.modelspec("lora"),
        }


def _public_name(parameter: str) -> str:
    """peft's name of an adapter weight without the adapter's own name: `to_q.lora_A.default.weight` => `to_q.lora_A.weight`."""
    return parameter.replace(f".{ADAPTER}.weight", ".weight")


def _publish(made: Path, target: Path) -> None:
    """Copy a file or a folder of files to where the user looks, whole or not at all."""
    if made.is_file():
        return write_file(target, made.read_bytes())
    with atomic_folder(target) as aside:
        shutil.copytree(made, aside, dirs_exist_ok=True)


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, set, dict))
