"""What a LoRA starts from: matrices made of the base model's weights or of what rounding took from them, or an existing LoRA file.

A layer's weight W is seen as a matrix (out, in), a convolution's (out, in x height x width). `factor` is what B A is scaled by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import ConfigError
from helpers.methods.lora_layouts import split_name

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.methods.quantised_base import QuantisedLinear
    from helpers.protocols import ModelFamily

Start = Callable[["Tensor", int, float], tuple["Tensor", "Tensor"]]  # (W, rank, factor) => A (rank, in), B (out, rank), float32

OVERSAMPLED = 8  # directions beyond the rank in the randomised SVD, and how often it is refined (Halko et al., 2011)
REFINED = 4
ALTERNATIONS = 5  # of rounding and decomposing in LoftQ, as in its paper: each gains less than the one before


def principal(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """PiSSA (Meng et al., 2024): factor B A is the best approximation of W of this rank, by its largest singular values."""
    import torch

    u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLED, *weight.shape), niter=REFINED)
    root = (s[:rank] / factor).sqrt()
    return (v[:, :rank] * root).T, u[:, :rank] * root


def orthonormal(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """OLoRA (Buyukakyuz, 2024): B and A are the first columns of Q and rows of R in W = Q R."""
    import torch

    q, _ = torch.linalg.qr(weight[:, :rank])
    return q.T @ weight, q


def orthogonal(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A and B are random and not zero, and B A is: their rows and columns come from halves of one orthogonal matrix.

    Raises ConfigError where the rank is odd.
    """
    import torch

    if rank % 2:
        raise ConfigError(f"--lora_init_type=orthogonal splits the rank in two halves; --lora_rank={rank} is odd.")
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    out, inside = weight.shape
    return (0.1 * torch.randn(inside, rank // 2) @ q[0::2]).T, 0.1 * torch.randn(out, rank // 2) @ q[1::2]


def nearest_to_unrounded(layer: QuantisedLinear, weight: Tensor, usual: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """LoftQ (Li et al., 2023), algorithm 1: rounds `layer` anew => A and B, with which it is nearer to W than rounding alone came.

    Each alternation rounds what B A leaves of W, and gives B A the largest directions of what that rounding lost. Where nothing was lost
    A is the `usual` (rank, in), and B is 0. What the randomised SVD draws is always the same and not the run's: so are the layer's bytes,
    on every process and in every life of a run, on devices that compute alike.
    """
    import torch

    rank, device = len(usual), layer.packed.device
    weight = weight.to(device, torch.float32)
    change = torch.zeros_like(weight)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for _ in range(ALTERNATIONS):
            layer.round(weight - change)
            a, b = principal(weight - layer.weight.float(), min(rank, *weight.shape), factor)
            change = factor * b @ a
    more = rank - len(a)  # a layer may be smaller than the rank
    a, b = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
    return torch.where(a.any(1, keepdim=True), a, usual.to(device)), b


STARTS: Mapping[str, Start] = {"pissa": principal, "olora": orthonormal, "orthogonal": orthogonal}
FROM_WEIGHTS = ("pissa", "olora")  # where B A is not zero, and the same is taken away again by matrices that stand still
FROM_ROUNDING = "loftq"  # where it is not zero either, and the same is taken away in files: what it gives back nobody lost there


def first_matrices(kind: str, layer: str, weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A and B, float32, in the shapes of peft: (rank, in) and (out, rank), or (rank, in, h, w) and (out, rank, 1, 1).

    ConfigError where the layer is smaller than the rank.
    """
    matrix = weight.detach().float().flatten(1)
    if kind in FROM_WEIGHTS and rank > min(matrix.shape):
        raise ConfigError(
            f"--lora_init_type={kind} takes {rank} directions of each layer, and {layer} has {min(matrix.shape)}; lower --lora_rank."
        )
    a, b = STARTS[kind](matrix, rank, factor)
    ones = [1] * (weight.ndim - 2)
    return a.reshape(rank, *weight.shape[1:]).contiguous(), b.reshape(-1, rank, *ones).contiguous()


def read_start(path: Path, family: ModelFamily) -> dict[str, Tensor]:
    """The weights of a LoRA file in any layout that diffusers reads, float32, by peft's names. ConfigError says what is wrong with it."""
    from safetensors.torch import load_file

    not_one = f"--init_lora: {path} is not a LoRA of {family.facts.title} that can be read"
    try:
        stored = load_file(path)
    except Exception as error:  # the library's own, of any kind
        raise ConfigError(f"{not_one}: {error}") from error
    try:
        matrices, _ = family.read_lora(path)
    except Exception as error:  # whatever diffusers meets in a file that it cannot convert
        raise ConfigError(f"{not_one}; its weights have names such as {min(stored, default='none')}.") from error
    scales = {name: tensor for name, tensor in stored.items() if name.endswith(".dora_scale")}
    modules = {split_name(name)[0] for name in matrices} if scales else set()
    renamed = {family.kohya_name(module): module for module in modules}
    for name, tensor in scales.items():  # diffusers leaves them out
        module = renamed.get(name.removesuffix(".dora_scale"))
        if module is None:
            raise ConfigError(f"--init_lora: {path} has a dora_scale for {name.partition('.')[0]}, and no LoRA there.")
        matrices[f"{module}.lora_magnitude_vector{'.weight' if module.startswith('text_encoder') else ''}"] = tensor
    return {name: tensor.float() for name, tensor in matrices.items()}


def require_same_layers(path: Path, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """ConfigError unless the file holds a tensor of the right size for every weight that is to move, and no other."""
    missing, other = sorted(parameters.keys() - found.keys()), sorted(found.keys() - parameters.keys())
    if missing:
        raise ConfigError(
            f"--init_lora: {path} has no {missing[0]} ({len(missing)} such in all), which --lora_targets or --use_dora ask for; "
            "leave them out to train what the file holds."
        )
    if other:
        why = (
            "which no text encoder has here, or none reads"
            if other[0].startswith("text_encoder")
            else "which is not trained with these --lora_targets"
        )
        raise ConfigError(f"--init_lora: {path} has {other[0]} ({len(other)} such in all), {why}.")
    for name, parameter in parameters.items():
        if found[name].numel() != parameter.numel():
            shapes = f"{tuple(found[name].shape)}, and here it is {tuple(parameter.shape)}"
            raise ConfigError(f"--init_lora: {name} in {path} is {shapes}; --lora_rank and the base model must be those of the file.")
