"""The LoRA of --base_lora: added to the frozen weights while an adapter is trained beside them, and not part of what is exported.

A distilled base model such as FLUX.1 schnell is trained beside a training adapter: the adapter's change of the base model is the state that
training needs, and the trained LoRA is used without it. Adding the change to the weights once costs nothing in the steps.

Symbols: W is the weight of a layer, (out, in) or a convolution's kernel; A and B are the file's matrices: W becomes W + scale B A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ConfigError
from helpers.methods.lora_init import InitialLora, read_lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.protocols import ModelFamily

OPTION = "--base_lora"


@dataclass(frozen=True)
class BaseLora:
    """A LoRA file for the frozen base model."""

    path: Path
    digest: str  # SHA-256 of the file
    lora: InitialLora

    @classmethod
    def read(cls, path: Path, family: ModelFamily) -> BaseLora:
        """Raises ConfigError where the file cannot be read as a LoRA of the family, or holds more than the change of its network."""
        lora = read_lora(path, family, OPTION)
        for name in lora.matrices:
            if name.startswith("text_encoder"):
                raise ConfigError(f"{OPTION}: {path} has layers of text encoders, such as {name}; remove them from it.")
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ConfigError(
                    f"{OPTION}: {path} has {name}, which is no matrix of a LoRA (DoRA cannot be used here); use another file."
                )
        with path.open("rb") as stream:
            return cls(path, hashlib.file_digest(stream, "sha256").hexdigest(), lora)

    def check(self, network: nn.Module) -> None:
        """Raises ConfigError unless every layer of the file is one of the network, of the same size. It may be on the meta device."""
        layers: dict[str, Any] = dict(network.named_modules())
        for name, rank in self.lora.ranks.items():
            weight = getattr(layers.get(name), "weight", None)
            if weight is None:
                raise ConfigError(f"{OPTION}: {self.path} has a layer {name}, which this base model does not have; use a LoRA made for it.")
            down, up = self._matrices(name)
            if up.shape[1] != rank or (up.shape[0], down[0].numel()) != (weight.shape[0], weight[0].numel()):
                raise ConfigError(
                    f"{OPTION}: {name} in {self.path} changes a weight of {up.shape[0]} x {down[0].numel()}, and this base model's is "
                    f"{weight.shape[0]} x {weight[0].numel()}; use a LoRA made for it."
                )

    def merge(self, network: nn.Module, device: torch.device) -> int:
        """Add the changes to the network's weights, in place; computed in float32 on `device`. => the number of layers"""
        import torch

        with torch.no_grad():
            for name, change in self._changes(device):
                weight: Any = network.get_submodule(name).weight
                weight.copy_(weight.to(device, torch.float32) + change.view(weight.shape))
        return len(self.lora.ranks)

    def _changes(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Layers, and scale B A (out, in), float32."""
        for name in self.lora.ranks:
            down, up = (matrix.to(device).flatten(1) for matrix in self._matrices(name))
            yield name, self.lora.scales.get(name, 1.0) * (up @ down)

    def _matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.lora.matrices[f"{layer}.lora_A.weight"], self.lora.matrices[f"{layer}.lora_B.weight"]
