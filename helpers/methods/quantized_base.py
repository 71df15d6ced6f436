"""Quantization of the frozen base model: the linear layers of its blocks, which hold nearly all of its weights, in 8 or 4 bits.

| kind | each weight is stored as | bits, with scales |
|---|---|---|
| `int8` | an integer from -127 to 127, times the row's largest weight / 127 | 8 |
| `fp8` | a float with 4 exponent and 3 mantissa bits, times the row's largest weight / 448 | 8 |
| `nf4` | one of 16 quantiles of a normal distribution, times the largest of its 64 weights (QLoRA: Dettmers et al., 2023) | 4.25 |

A layer's full weights are computed again each time they are needed: in the forward pass, and for the gradient in the backward pass. The
8-bit numbers are torch's; nf4 is from bitsandbytes. Layers outside the blocks (first and last layers, time and text embeddings) are not
quantized: they have few weights, and every signal passes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.errors import ConfigError

LARGEST_INT8, LARGEST_FLOAT8 = 127.0, 448.0  # the latter of torch.float8_e4m3fn
BLOCK_SIZE = 64  # weights that share a scale in nf4


@dataclass(frozen=True)
class Kind:
    """How weights are stored. `pack`: (out, in) float32 => bytes, scales; `unpack`: bytes, scales, shape, dtype => (out, in)."""

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


def quantize(network: nn.Module, kind: str, device: torch.device) -> None:
    """Quantize the linear layers of a network's blocks in place. They move to `device` one by one, so it never holds all full weights."""
    for path, layer in list(layers_of_blocks(network)):
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, QuantizedLinear(layer, kind, device))


def check_quantization(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try one small layer on this device, before hours of caching. Raises ConfigError where the device cannot compute with it."""
    try:
        input = torch.ones(1, BLOCK_SIZE, device=device, dtype=dtype, requires_grad=True)
        QuantizedLinear(nn.Linear(BLOCK_SIZE, BLOCK_SIZE, dtype=dtype), kind, device)(input).sum().backward()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # the last two are bitsandbytes'
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"--base_quantization={kind} does not work on this {device.type} device ({reason}); choose another kind, or leave it out."
        ) from error


def count_weights(network: nn.Module) -> int:
    """How many weights a network has. A quantized layer counts its weights, not the bytes that store them."""
    size = 0
    for module in network.modules():
        if isinstance(module, nn.Linear):
            size += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
        else:
            size += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return size


def bytes_of(network: nn.Module) -> int:
    """The size of a network's weights in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weights are stored in fewer bits. `weight` computes them in full."""

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate a weight
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.full_dtype = layer.weight.dtype
        packed, scales = KINDS[kind].pack(layer.weight.detach().to(device, torch.float32))
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def set_weight(self, weight: Tensor) -> None:
        """Quantize and store another weight, (out, in) float32 on the layer's device."""
        self.packed.data, self.scales.data = KINDS[self.kind].pack(weight)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a property, so that nothing keeps the full weights
        """(out, in), in the dtype of the layer before quantization."""
        return self._full(self.full_dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        output: Tensor = _Product.apply(input.to(dtype), self)
        return output if self.bias is None else output + self.bias.to(dtype)

    def _full(self, dtype: torch.dtype) -> Tensor:
        return KINDS[self.kind].unpack(self.packed, self.scales, torch.Size((self.out_features, self.in_features)), dtype)


class _Product(torch.autograd.Function):
    """x W^T. Plain autograd would keep each layer's full weights until the backward pass, and no memory would be saved."""

    @staticmethod
    def forward(context: Any, input: Tensor, layer: QuantizedLinear) -> Tensor:
        context.layer = layer
        return functional.linear(input, layer._full(input.dtype))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer._full(gradient.dtype), None


def layers_of_blocks(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are quantized, with their names: every linear layer inside a top-level module named ...block or ...blocks."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and path.split(".")[0].endswith(("block", "blocks")):
            yield path, module


# -- the kinds --------------------------------------------------------------------------------------------------------------


def _row_scales(weight: Tensor, largest: float) -> Tensor:
    return weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = _row_scales(weight, LARGEST_INT8)
    return (weight / scales).round().to(torch.int8), scales


def _unpack_int8(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return packed.to(dtype) * scales.to(dtype)


def _pack_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scales keep small weights: below 2^-6 a float8 loses mantissa bits."""
    scales = _row_scales(weight, LARGEST_FLOAT8)
    return (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales  # as bytes, since processes cannot exchange float8


def _unpack_float8(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return packed.view(torch.float8_e4m3fn).to(dtype) * scales.to(dtype)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) => packed bytes and float16 scales, row after row."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=False)
    return packed, state.absmax.half()


def _unpack_nf4(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As one long row: on a CPU bitsandbytes (0.50) uses wrong scales where a block of 64 weights spans two rows."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    row = torch.Size((shape.numel(),))
    return dequantize_4bit(packed, QuantState(scales.float(), row, None, BLOCK_SIZE, "nf4", dtype)).reshape(shape)


KINDS: Mapping[str, Kind] = {
    "int8": Kind(_pack_int8, _unpack_int8),
    "fp8": Kind(_pack_float8, _unpack_float8),
    "nf4": Kind(_pack_nf4, _unpack_nf4),
}
