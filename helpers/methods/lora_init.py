"""The initial matrices of a LoRA: computed from the base model's weights (--lora_init_type), or read from a LoRA file (--init_lora).

Symbols: W is the weight of a layer, (out, in), where a convolution's is (out, in x height x width); A (rank, in) and B (out, rank) are the
LoRA matrices. The layer computes with W + factor B A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import ConfigError
from helpers.methods.lora_layouts import split_name
from helpers.storage.tensors import first_not_finite

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.protocols import ModelFamily

Initialization = Callable[["Tensor", int, float], tuple["Tensor", "Tensor"]]  # (W, rank, factor) => A, B, float32

# Of the randomized SVD (Halko et al., 2011): directions computed beyond the rank, and power iterations.
OVERSAMPLING = 8
POWER_ITERATIONS = 4


def principal_components(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """PiSSA (Meng et al., 2024): factor B A is the best approximation of W with this rank, made of its largest singular values."""
    import torch

    u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLING, *weight.shape), niter=POWER_ITERATIONS)
    root = (s[:rank] / factor).sqrt()
    return (v[:, :rank] * root).T, u[:, :rank] * root


def orthonormal(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """OLoRA (Buyukakyuz, 2024): with W = Q R, B is the first `rank` columns of Q, and A the first `rank` rows of R."""
    import torch

    q, _ = torch.linalg.qr(weight[:, :rank])
    return q.T @ weight, q


def orthogonal(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """Random A and B whose product is zero: A uses one half of the directions of an orthogonal matrix, B the other half.

    Neither matrix is zero, so both get gradients in the first step. Raises ConfigError where the rank is odd.
    """
    import torch

    if rank % 2:
        raise ConfigError(f"--lora_init_type=orthogonal needs an even rank; --lora_rank={rank} is odd.")
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    out, inside = weight.shape
    return (0.1 * torch.randn(inside, rank // 2) @ q[0::2]).T, 0.1 * torch.randn(out, rank // 2) @ q[1::2]


INITIALIZATIONS: Mapping[str, Initialization] = {"pissa": principal_components, "olora": orthonormal, "orthogonal": orthogonal}
FROM_WEIGHTS = ("pissa", "olora")  # their B A is not zero: a second, constant pair of matrices subtracts it, so that step 0 changes nothing


def first_matrices(kind: str, layer: str, weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A and B of a layer, float32, in PEFT's shapes: (rank, in) and (out, rank), or (rank, in, h, w) and (out, rank, 1, 1).

    Raises ConfigError where the layer has fewer inputs or outputs than the rank.
    """
    matrix = weight.detach().float().flatten(1)
    if kind in FROM_WEIGHTS and rank > min(matrix.shape):
        raise ConfigError(
            f"--lora_init_type={kind} needs layers of at least --lora_rank={rank} inputs and outputs, and {layer} has {min(matrix.shape)}; "
            "lower --lora_rank."
        )
    a, b = INITIALIZATIONS[kind](matrix, rank, factor)
    ones = [1] * (weight.ndim - 2)
    return a.reshape(rank, *weight.shape[1:]).contiguous(), b.reshape(-1, rank, *ones).contiguous()


@dataclass(frozen=True)
class InitialLora:
    """A LoRA file that training starts from."""

    matrices: Mapping[str, Tensor]  # by their PEFT names, float32, as they are in the file
    scales: Mapping[str, float]  # of B A, by layer; none for layers whose matrices diffusers has multiplied by it

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        return {split_name(name)[0]: len(tensor) for name, tensor in self.matrices.items() if name.endswith(".lora_A.weight")}

    def trained_at(self, scales: Mapping[str, float]) -> dict[str, Tensor]:
        """The matrices for training with these scales: the change of each layer stays the same."""
        factors = {layer: self.scales.get(layer, 1.0) / scale for layer, scale in scales.items()}
        return {
            name: tensor * factor
            if name.endswith(".lora_B.weight") and not math.isclose(factor := factors.get(split_name(name)[0], 1.0), 1.0, rel_tol=1e-6)
            else tensor
            for name, tensor in self.matrices.items()
        }


def read_lora(path: Path, family: ModelFamily, option: str = "--init_lora") -> InitialLora:
    """A LoRA file in any format that diffusers reads, or in kohya's.

    Raises ConfigError with the reason where the file cannot be read as a LoRA of the family. `option` names the file, in messages.
    """
    from safetensors.torch import load_file

    unreadable = f"{option}: {path} cannot be read as a LoRA of {family.facts.title}"
    try:
        stored = load_file(path)
    except Exception as error:  # the library's own, of any kind
        raise ConfigError(f"{unreadable}: {error}") from error
    if tensor := first_not_finite(stored):
        raise ConfigError(f"{option}: {path} holds numbers that are not finite, in {tensor}: use another file.")
    try:
        matrices, scales = family.read_lora(path)
    except Exception as error:  # diffusers raises errors of many kinds for a file that it cannot convert
        raise ConfigError(f"{unreadable}; its weights have names such as {min(stored, default='none')}.") from error
    magnitudes = {name: tensor for name, tensor in stored.items() if name.endswith(".dora_scale")}
    modules = {split_name(name)[0] for name in matrices} if magnitudes else set()
    renamed = {family.kohya_name(module): module for module in modules}
    for name, magnitude in magnitudes.items():  # diffusers ignores them
        module = renamed.get(name.removesuffix(".dora_scale"))
        if module is None:
            raise ConfigError(f"{option}: {path} has a dora_scale for {name.partition('.')[0]}, but no LoRA matrices for that layer.")
        matrices[f"{module}.lora_magnitude_vector{'.weight' if module.startswith('text_encoder') else ''}"] = magnitude
    return InitialLora({name: tensor.float() for name, tensor in matrices.items()}, scales)


def require_same_layers(path: Path, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raises ConfigError unless the file holds a tensor of the right size for every trained weight, and no others."""
    missing, other = sorted(parameters.keys() - found.keys()), sorted(found.keys() - parameters.keys())
    if missing:
        raise ConfigError(
            f"--init_lora: {path} lacks {missing[0]} ({len(missing)} weights in all), which --lora_targets or --use_dora ask for; "
            "leave them out to train the layers of the file."
        )
    if other:
        reason = (
            "which no text encoder trained here has"
            if other[0].startswith("text_encoder")
            else "which is not trained with these --lora_targets"
        )
        raise ConfigError(f"--init_lora: {path} has {other[0]} ({len(other)} weights in all), {reason}.")
    for name, parameter in parameters.items():
        if found[name].numel() != parameter.numel():
            shapes = f"has shape {tuple(found[name].shape)}, and here it needs {tuple(parameter.shape)}"
            raise ConfigError(f"--init_lora: {name} in {path} {shapes}; use the --lora_rank and the base model of the file.")
