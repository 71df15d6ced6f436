"""A frozen network in fewer bits: its linear layers, where nearly all weights of a transformer or a U-Net are, are rounded to 8 or 4.

| kind | a weight is kept as | bits, with scales |
|---|---|---|
| `int8` | a whole number from -127 to 127, times its row's largest weight / 127 | 8 |
| `fp8` | a float of 4 exponent and 3 mantissa bits, times its row's largest / 448 | 8 |
| `nf4` | one of 16 numbers that a normal distribution fills evenly, times the largest of its 64 (QLoRA: Dettmers et al., 2023) | 4.25 |

A layer's weights are made full again each time they are used, once on the way forward and once for the gradient that flows through them
to what is trained. Numbers of 8 bits are torch's own, nf4 is bitsandbytes'. What is not inside a block (the first and last layers, the
embeddings of time and text) stays as it is: few weights, and every signal passes through them.
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
TOGETHER = 64  # weights that share a scale in nf4


@dataclass(frozen=True)
class Kind:
    """How weights are kept. `pack`: (out, in) float32 => bytes, scales; `unpack`: those, the shape, a precision => (out, in)."""

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


def quantise(network: nn.Module, kind: str, device: torch.device, keep: bool = False) -> dict[str, Tensor]:
    """Round the weights of a network's blocks in place. Those layers move to `device` one by one; it never holds them all in full.

    => where `keep` asks for it, their weights as they were, (out, in), by the layers' names; they stay where they are.
    """
    unrounded: dict[str, Tensor] = {}
    for path, layer in list(layers_of_blocks(network)):
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, QuantisedLinear(layer, kind, device))
        if keep:
            unrounded[path] = layer.weight.detach()
    return unrounded


def check_quantization(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Ask one small layer on this device, so that what it cannot do is known before hours of caching. Raises ConfigError."""
    try:
        question = torch.ones(1, TOGETHER, device=device, dtype=dtype, requires_grad=True)
        QuantisedLinear(nn.Linear(TOGETHER, TOGETHER, dtype=dtype), kind, device)(question).sum().backward()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"--base_quantization={kind} does not work on this {device.type} device ({reason}); choose another kind, or leave it out."
        ) from error


def size_of(network: nn.Module) -> int:
    """How many weights a network has; of a quantised layer its weights, and not the bytes that they are packed into."""
    size = 0
    for module in network.modules():
        if isinstance(module, nn.Linear):
            size += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
        else:
            size += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return size


def bytes_of(network: nn.Module) -> int:
    """Bytes of a network's weights as they are kept."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


class QuantisedLinear(nn.Linear):
    """A linear layer that stands still, its weights in fewer bits. It has `weight`, in full, for whoever asks."""

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)  # that of Linear would make a weight
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.full_dtype = layer.weight.dtype
        packed, scales = KINDS[kind].pack(layer.weight.detach().to(device, torch.float32))
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def round(self, weight: Tensor) -> None:
        """Keep these weights instead, (out, in) float32 on the layer's device."""
        self.packed.data, self.scales.data = KINDS[self.kind].pack(weight)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # no parameter: nothing may keep it
        """(out, in), in the precision that the layer had."""
        return self._full(self.full_dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        answer: Tensor = _Product.apply(input.to(dtype), self)
        return answer if self.bias is None else answer + self.bias.to(dtype)

    def _full(self, dtype: torch.dtype) -> Tensor:
        return KINDS[self.kind].unpack(self.packed, self.scales, torch.Size((self.out_features, self.in_features)), dtype)


class _Product(torch.autograd.Function):
    """x W^T. Left to itself, autograd would keep each layer's full weights until its gradient is due, and nothing would be saved."""

    @staticmethod
    def forward(context: Any, input: Tensor, layer: QuantisedLinear) -> Tensor:
        context.layer = layer
        return functional.linear(input, layer._full(input.dtype))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer._full(gradient.dtype), None


def layers_of_blocks(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """What is rounded: every linear layer, with its name, inside a part of the network whose name ends with block or blocks."""
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
    """Without the scales most small weights of a network would be lost: below 2^-6 a float8 has fewer and fewer bits."""
    scales = _row_scales(weight, LARGEST_FLOAT8)
    return (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales  # as bytes: what processes exchange by knows no float8


def _unpack_float8(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return packed.view(torch.float8_e4m3fn).to(dtype) * scales.to(dtype)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and float16 scales, in the order of rows."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=TOGETHER, quant_type="nf4", compress_statistics=False)
    return packed, state.absmax.half()


def _unpack_nf4(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As one long row: on a CPU bitsandbytes (0.50) takes other scales than it packed by where 64 are parts of several rows."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    row = torch.Size((shape.numel(),))
    return dequantize_4bit(packed, QuantState(scales.float(), row, None, TOGETHER, "nf4", dtype)).reshape(shape)


KINDS: Mapping[str, Kind] = {
    "int8": Kind(_pack_int8, _unpack_int8),
    "fp8": Kind(_pack_float8, _unpack_float8),
    "nf4": Kind(_pack_nf4, _unpack_nf4),
}
