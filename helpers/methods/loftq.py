"""LoftQ (Li et al., 2023): a LoRA on a quantized base model that starts with what quantization lost.

Symbols: W is the weight of a layer, (out, in); Q is the quantized weight; A and B are the LoRA matrices, `factor` their scale.

A usual LoRA starts with B = 0, and the layer computes with Q. LoftQ chooses Q, A and B so that Q + factor B A is close to W.

The exported file is for the unquantized model, which already has W: there, factor B A of the start would be added on top. So files also
hold a second, constant pair of matrices that subtracts it again (`subtracted`). The difference between training and use of the file is then
the error W - (Q + factor B A) of the start, which LoftQ makes small. Without the second pair it would be W - Q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Settings
from helpers.errors import ConfigError
from helpers.methods.lora_init import principal_components

if TYPE_CHECKING:
    from torch import Tensor, nn

    from helpers.methods.quantized_base import QuantizedLinear
    from helpers.protocols import ModelFamily

NAME = "loftq"  # the value of --lora_init_type
ITERATIONS = 5  # of quantizing and decomposing, as in the paper; each gains less than the one before


def refusals(settings: Settings) -> Iterator[str]:
    if settings["base_quantization"] == "none":
        yield (
            f"--lora_init_type={NAME} starts from the quantization error of the base model, and this base model is not quantized; "
            "set --base_quantization to int8, fp8 or nf4, or leave it out."
        )


Progress = Callable[[Mapping[str, Any]], Iterable[tuple[str, Any]]]  # yields the items of a mapping, and shows how far they are


def initialize(denoiser: nn.Module, family: ModelFamily, adapter: str, progress: Progress) -> None:
    """Set Q, A and B of every adapted layer that is quantized, in place; other layers keep their usual start.

    `adapter` is the name of the LoRA in each layer. The original weights are read from the base model once more. Raises ConfigError where
    no adapted layer is one that --base_quantization quantizes.
    """
    from peft.tuners.lora import LoraLayer

    from helpers.methods.quantized_base import QuantizedLinear, layers_of_blocks

    in_blocks = {path.removesuffix(".base_layer") for path, _ in layers_of_blocks(denoiser)}
    adapted = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer) and name in in_blocks}
    if not adapted:
        raise ConfigError(
            f"--lora_init_type={NAME} starts from the quantization error of layers inside the network's blocks, "
            "and --lora_targets names none of those; name others, or leave it out."
        )
    quantized = {name: layer for name, layer in adapted.items() if isinstance(layer.get_base_layer(), QuantizedLinear)}
    if not quantized:
        return  # a network without weights, which is only checked
    dtype = next(iter(quantized.values())).get_base_layer().full_dtype
    original = family.load(dtype).denoiser
    for name, layer in progress(quantized):
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight = original.get_submodule(name).weight.detach()
        a, b = decompose(layer.get_base_layer(), weight, down.detach(), layer.scaling[adapter])
        down.data.copy_(a)
        up.data.copy_(b)


def decompose(layer: QuantizedLinear, weight: Tensor, usual: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper. weight W (out, in), usual (rank, in) => A (rank, in), B (out, rank), float32; `layer` gets a new Q.

    Each iteration quantizes W - factor B A, then computes B A again as the largest singular directions of W - Q. Where the layer has
    fewer directions than the rank, or lost nothing, the rows of A are those of `usual`, and B is 0: with both at 0 neither would learn.

    The randomized SVD has a seed of its own, so that every process and every resumed run gets the same Q, which no checkpoint holds;
    bit for bit on devices that compute alike.
    """
    import torch

    rank, device = len(usual), layer.packed.device
    weight = weight.to(device, torch.float32)
    change = torch.zeros_like(weight)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for _ in range(ITERATIONS):
            layer.set_weight(weight - change)
            a, b = principal_components(weight - layer.weight.float(), min(rank, *weight.shape), factor)
            change = factor * b @ a
    missing = rank - len(a)
    a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return torch.where(a.any(1, keepdim=True), a, usual.to(device)), b


def subtracted(parameters: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The second pair for files: the A of each layer as it is now, and its -B, under their names after `rename`."""
    return {rename(name): (-1 if ".lora_B." in name else 1) * weights.detach() for name, weights in parameters.items()}
