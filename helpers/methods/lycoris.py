"""LoKr and LoHa (Yeh et al., 2024; FedPara: Hyeon-Woo et al., 2022) by the LyCORIS library: adapters that compose the change of a weight
in other ways than LoRA.

LoKr uses the Kronecker product of a small and a large matrix. LoHa uses the elementwise product of two low-rank products B A. Both start at
a change of zero. Files are written with the library's own names and, where the family has them, with kohya's; the tensors are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.errors import ConfigError
from helpers.methods.lora import (
    LEARNING_RATE,
    WEIGHTS_NAME,
    default_targets,
    fits,
    frozen_dtype,
    refused_by_adapters,
    require_each_to_fit,
)
from helpers.methods.lora_layouts import kohya_metadata
from helpers.protocols import LIVE, Parts, Trainable
from helpers.storage.atomic import scratch_folder, write_file
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily

ADAPTER = "lycoris"  # the adapter's name in each layer, and the prefix of layer names in the library's files
TITLES = {"lokr": "LoKr", "loha": "LoHa"}


def refusals(settings: Settings) -> Iterator[str]:
    kind = str(settings["lora_algorithm"])
    title = TITLES.get(kind, kind)
    yield from refused_by_adapters(settings)
    if settings["train_text_encoder"]:
        yield f"--train_text_encoder needs --lora_algorithm=lora or locon; {title} cannot train text encoders."
    if settings["use_dora"]:
        yield f"--use_dora is for LoRA and LoCon; leave it out, or use --lora_algorithm=lora instead of {kind}."
    if settings["lora_init_type"] != "default":
        yield f"--lora_init_type={settings['lora_init_type']} is for LoRA and LoCon; {title} has its own initialization."
    if settings["lora_layers"]:
        yield f"--lora_layers is for LoRA and LoCon; leave it out with {title}."
    if settings["init_lora"]:
        yield f"--init_lora is for LoRA and LoCon; {title} cannot start from a file."
    if settings["lora_dropout"]:
        yield f"--lora_dropout is for LoRA and LoCon, and {title} has none; set --lora_dropout=0."
    if settings["use_rslora"] and kind == "lokr":
        yield "--use_rslora scales by the rank, and some matrices of LoKr have none; leave it out."


class Lycoris:
    """Trains float32 LoKr or LoHa adapters beside frozen weights."""

    facts = Facts(name="lycoris", title="LyCORIS", defaults={"learning_rate": LEARNING_RATE}, judge=refusals)

    def __init__(self, options: AdapterOptions, family: ModelFamily) -> None:
        self.options = options
        self.family = family

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        return frozen_dtype(mixed_precision)

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw"  # the adapter's weights are float32 in every precision

    def check(self, outline: Parts) -> None:
        import torch

        with torch.device("meta"):
            self.attach(outline)

    def attach(self, parts: Parts) -> Trainable:
        """Raises ConfigError where a target cannot have such an adapter, or no layer matches the targets."""
        from helpers.methods.quantized_base import count_weights

        denoiser = parts.denoiser.requires_grad_(False).train()
        total = count_weights(denoiser)
        require_each_to_fit(self.options.lora_targets, denoiser)
        targets = list(self.options.lora_targets) or default_targets(self.options.lora_algorithm, self.family, denoiser)
        layers = _layers(denoiser, targets)
        if not layers:
            raise ConfigError(f"--lora_targets={','.join(targets)} matches no linear layer or convolution of this model; name others.")
        _quiet_and_repeatable()
        for name, layer in layers.items():
            adapter = self._adapter(name, layer)
            adapter.apply_to()  # replaces the layer's forward
            layer.add_module(ADAPTER, adapter)  # so that it moves with the layer, and its parameters have names
        parameters = {name: parameter for name, parameter in denoiser.named_parameters() if f".{ADAPTER}." in name}
        count = sum(parameter.numel() for parameter in parameters.values())
        title = TITLES[self.options.lora_algorithm]
        description = f"{title} rank {self.options.lora_rank}, {count / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters"
        return Trainable(denoiser, parameters, description, parts.denoiser_folder)

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write a file with the library's names and, where the family has them, one with kohya's. Both are read back and compared."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors(trainable, weights or trainable.parameters)
        own = {f"{_file_name(module)}.{weight}": tensor for (module, weight), tensor in tensors.items()}
        path = folder / f"{WEIGHTS_NAME}{label}.safetensors"
        written = [self._write(own, path, {"format": "pt", "lycoris_config": json.dumps(self._described())})]
        names = {module: self.family.kohya_name(module) for module, _ in tensors}
        if all(isinstance(name, str) for name in names.values()):
            kohya = {f"{names[module]}.{weight}": tensor for (module, weight), tensor in tensors.items()}
            described = kohya_metadata(self.options.lora_rank, self.options.lora_alpha, self.options.lora_algorithm)
            path = folder / f"{WEIGHTS_NAME}{label}.kohya.safetensors"
            written.append(self._write(kohya, path, {**described, **self.family.modelspec("lora")}))
        return written

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(folder / f"{WEIGHTS_NAME}{label}.safetensors")
        return {name: stored[f"{_file_name(module)}.{weight}"] for name, (module, weight) in _split(trainable.parameters).items()}

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write the files. With an average they hold the average, and `..._live` files hold the live weights."""
        with scratch_folder(folder, "lora") as aside:
            files = self.save(trainable, aside, average)
            if average is not None:
                files += self.save(trainable, aside, label=LIVE)
            for file in files:
                write_file(folder / file.name, file.read_bytes())
        return [folder / file.name for file in files]

    def _adapter(self, name: str, layer: nn.Module) -> Any:
        options, kind = self.options, self._kind()
        try:
            # In bypass mode the change is added to the layer's output. Added to a half-precision weight it would be lost to rounding.
            return kind(
                name,
                layer,
                lora_dim=options.lora_rank,
                alpha=options.lora_alpha,
                bypass_mode=True,
                rs_lora=options.use_rslora,
                factor=options.lokr_factor or -1,
            )
        except ValueError as error:
            raise ConfigError(f"--lora_targets: {name} cannot have a {TITLES[options.lora_algorithm]}: {error}") from error

    def _kind(self) -> Any:
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule

        return {"lokr": LokrModule, "loha": LohaModule}[self.options.lora_algorithm]

    def _tensors(self, trainable: Trainable, weights: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """Tensors for files by (module, name of the weight), with each layer's alpha; alpha / rank is the layer's scale."""
        split = _split(trainable.parameters)
        tensors = {place: weights[name].detach().float() for name, place in split.items()}
        for module in dict.fromkeys(module for module, _ in split.values()):
            tensors[module, "alpha"] = trainable.denoiser.get_submodule(f"{module}.{ADAPTER}").alpha.detach().float()
        return tensors

    def _described(self) -> dict[str, object]:
        """The settings as arguments of the library's `create_lycoris`."""
        described: dict[str, object] = {"algo": self.options.lora_algorithm, "linear_dim": self.options.lora_rank}
        described |= {"linear_alpha": self.options.lora_alpha, "multiplier": 1.0}
        return described | ({"factor": self.options.lokr_factor or -1} if self.options.lora_algorithm == "lokr" else {})

    def _write(self, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
        """Raises RuntimeError unless the library recognizes the layers in the file, and the tensors are those that were trained."""
        import torch
        from lycoris.modules import get_module
        from safetensors.torch import load_file

        save_tensors(tensors, path, metadata)
        stored = load_file(path)
        kinds = {get_module(stored, layer)[0] for layer in {name.partition(".")[0] for name in stored}}
        same = stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name].cpu()) for name in tensors)
        if not same or kinds != {self._kind()}:
            raise RuntimeError(f"{path} does not hold the trained weights.")
        return path


def _quiet_and_repeatable() -> None:
    """Turn off the library's log lines, one a layer width, and its compiled kernels.

    It compiles kernels for the shapes that it meets first, so that a resumed run would differ in the last bits from an uninterrupted one.
    PyTorch's own operations do not.
    """
    from lycoris.kernels.dispatch import FUSED, demote

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    for backend in (*FUSED, "compile"):
        demote(backend)


def _layers(denoiser: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that match the targets, by name; the same choice as PEFT makes."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, kinds) and fits(name, targets)}


def _split(names: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """`mid_block.to_q.lycoris.lokr_w1` => (`mid_block.to_q`, `lokr_w1`)."""
    return {name: (module, weight) for name in names for module, _, weight in [name.rpartition(f".{ADAPTER}.")]}


def _file_name(module: str) -> str:
    """A module's name in the library's files: `mid_block.to_q` => `lycoris_mid_block_to_q`."""
    return f"{ADAPTER}_{module.replace('.', '_')}"
