"""LoKr and LoHa (Yeh et al., 2024; FedPara: Hyeon-Woo et al., 2022) by the LyCORIS library: other ways to put a layer's change together.

LoKr: the Kronecker product of a small matrix and a large one. LoHa: the product by elements of two B A. Both begin at zero. Files are in
the library's own layout and, where the family has one, in kohya's beside it; they differ in the layers' names only.
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
    frozen_dtype,
    is_expression,
    refused_by_adapters,
    require_each_to_fit,
)
from helpers.methods.lora_layouts import kohya_metadata
from helpers.protocols import Parts, Trainable
from helpers.storage.atomic import scratch_folder, write_file
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily

ADAPTER = "lycoris"  # the name of the adapter in each layer, and the prefix of the layers' names in the library's files
TITLES = {"lokr": "LoKr", "loha": "LoHa"}


def refusals(settings: Settings) -> Iterator[str]:
    kind = str(settings["lora_algorithm"])
    title = TITLES.get(kind, kind)
    yield from refused_by_adapters(settings)
    if settings["train_text_encoder"]:
        yield f"--train_text_encoder needs --lora_algorithm=lora or locon; {settings['lora_algorithm']} trains the network alone."
    if settings["use_dora"]:
        yield f"--use_dora is for LoRA and LoCon; leave it out, or use --lora_algorithm=lora instead of {kind}."
    if settings["lora_init_type"] != "default":
        yield f"--lora_init_type={settings['lora_init_type']} is for LoRA and LoCon; {title} has a start of its own."
    if settings["init_lora"]:
        yield f"--init_lora is for LoRA and LoCon; {title} cannot start from a file."
    if settings["lora_dropout"]:
        yield f"{title} has no input of its own that could be dropped; set --lora_dropout=0."
    if settings["use_rslora"] and kind == "lokr":
        yield "--use_rslora scales by the rank, which whole matrices of LoKr do not have; leave it out."


class Lycoris:
    """Trains float32 adapters of the LyCORIS library beside frozen weights."""

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
        """Raises ConfigError where a target cannot have such an adapter, or none fits."""
        from helpers.methods.quantised_base import size_of

        denoiser = parts.denoiser.requires_grad_(False).train()
        total = size_of(denoiser)
        require_each_to_fit(self.options.lora_targets, denoiser)
        targets = list(self.options.lora_targets) or default_targets(self.options.lora_algorithm, self.family, denoiser)
        layers = _layers(denoiser, targets)
        if not layers:
            raise ConfigError(f"--lora_targets={','.join(targets)} fits no linear layer or convolution of this model; name others.")
        _quiet_and_repeatable()
        for name, layer in layers.items():
            adapter = self._adapter(name, layer)
            adapter.apply_to()  # the layer's forward is the adapter's from here on
            layer.add_module(ADAPTER, adapter)  # so it moves to a device, and has a name, with the layer
        parameters = {name: parameter for name, parameter in denoiser.named_parameters() if f".{ADAPTER}." in name}
        count = sum(parameter.numel() for parameter in parameters.values())
        title = TITLES[self.options.lora_algorithm]
        description = f"{title} rank {self.options.lora_rank}, {count / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters"
        return Trainable(denoiser, parameters, description, parts.denoiser_folder)

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write the library's layout, and kohya's beside it where the family has one; both are opened again and compared."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors(trainable, weights or trainable.parameters)
        own = {f"{_file_name(module)}.{weight}": tensor for (module, weight), tensor in tensors.items()}
        path = folder / f"{WEIGHTS_NAME}{label}.safetensors"
        written = [self._write(own, path, {"format": "pt", "lycoris_config": json.dumps(self._described())})]
        names = {module: self.family.kohya_name(module) for module, _ in tensors}
        if all(names.values()):
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
        """Write the files, of the average if there is one, with the live weights beside them as `..._live`."""
        with scratch_folder(folder, "lora") as aside:
            files = self.save(trainable, aside, average)
            if average is not None:
                files += self.save(trainable, aside, label="_live")
            for file in files:
                write_file(folder / file.name, file.read_bytes())
        return [folder / file.name for file in files]

    def _adapter(self, name: str, layer: nn.Module) -> Any:
        options, kind = self.options, self._kind()
        try:
            # In bypass mode the change is added to the layer's output. Added to the weight it would be rounded away in half precision.
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
        """By (module, name of the weight); with each layer's alpha, as the library keeps it: over the rank it is the scale."""
        split = _split(trainable.parameters)
        tensors = {place: weights[name].detach().float() for name, place in split.items()}
        for module in dict.fromkeys(module for module, _ in split.values()):
            tensors[module, "alpha"] = trainable.denoiser.get_submodule(f"{module}.{ADAPTER}").alpha.detach().float()
        return tensors

    def _described(self) -> dict[str, object]:
        """The settings under the names that the library's `create_lycoris` has for them."""
        described: dict[str, object] = {"algo": self.options.lora_algorithm, "linear_dim": self.options.lora_rank}
        described |= {"linear_alpha": self.options.lora_alpha, "multiplier": 1.0}
        return described | ({"factor": self.options.lokr_factor or -1} if self.options.lora_algorithm == "lokr" else {})

    def _write(self, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
        """Raises RuntimeError unless the library finds in the file just the layers that were trained, each tensor to the bit."""
        import torch
        from lycoris.modules import get_module
        from safetensors.torch import load_file

        save_tensors(tensors, path, metadata)
        stored = load_file(path)
        kinds = {get_module(stored, layer)[0] for layer in {name.partition(".")[0] for name in stored}}
        same = stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name].cpu()) for name in tensors)
        if not same or kinds != {self._kind()}:
            raise RuntimeError(f"{path} does not read back as it was trained.")
        return path


def _quiet_and_repeatable() -> None:
    """The library says for every width that a matrix is kept whole; and on a GPU it compiles kernels by the shapes that it happens to meet
    first, so a run that was resumed would differ in its last bits from one that was not. PyTorch's own operations are the same always.
    """
    from lycoris.kernels.dispatch import FUSED, demote

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    for backend in (*FUSED, "compile"):
        demote(backend)


def _layers(denoiser: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that the targets fit, by name, as peft would choose them."""
    import re

    from torch import nn

    def fits(name: str) -> bool:
        if is_expression(targets):
            return re.fullmatch(targets[0], name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, kinds) and fits(name)}


def _split(names: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """`mid_block.to_q.lycoris.lokr_w1` => (`mid_block.to_q`, `lokr_w1`)."""
    return {name: (module, weight) for name in names for module, _, weight in [name.rpartition(f".{ADAPTER}.")]}


def _file_name(module: str) -> str:
    """A module's name in the library's files: `mid_block.to_q` => `lycoris_mid_block_to_q`."""
    return f"{ADAPTER}_{module.replace('.', '_')}"
