"""Memory and speed options that do not depend on the model family: checkpointing, attention kernels, compiling."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.backends import cuda
from torch.nn import functional

from helpers.errors import ConfigError

if TYPE_CHECKING:
    from helpers.config.options import RunOptions

# PyTorch's switches for attention kernels. They are named after CUDA, but CPU kernels follow them too.
KERNELS = {
    "flash": cuda.enable_flash_sdp,
    "efficient": cuda.enable_mem_efficient_sdp,
    "cudnn": cuda.enable_cudnn_sdp,
    "math": cuda.enable_math_sdp,
}
HEAD = 64  # width of an attention head in most networks


def apply_memory_options(denoiser: Any, options: RunOptions, supported: Collection[str]) -> None:
    """Switch on the memory options; `supported` are those that its family has."""
    if options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if options.unet_attention_slice and "unet_attention_slice" in supported:
        denoiser.set_attention_slice(_half_of_the_heads(denoiser))
    if options.channels_last and "channels_last" in supported:
        denoiser.to(memory_format=torch.channels_last)


def _half_of_the_heads(denoiser: Any) -> list[int]:
    """Heads per slice of each attention layer in order: half, as diffusers' "auto", but at least one (diffusers' gives 0 for 1 head)."""
    layers = [layer for layer in denoiser.modules() if layer is not denoiser and hasattr(layer, "set_attention_slice")]
    return [max(1, layer.sliceable_head_dim // 2) for layer in layers]


def choose_attention(kernel: str) -> None:
    """Use one attention kernel in this process, and the math kernel as a fallback for what it cannot do."""
    for name, switch in KERNELS.items():
        switch(kernel in ("auto", name) or name == "math")


def check_attention(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError if the kernel cannot run a simple attention on this device in this precision."""
    if kernel == "auto":
        return
    for name, switch in KERNELS.items():
        switch(name == kernel)
    query = torch.zeros(1, 1, 8, HEAD, device=device, dtype=dtype)
    try:
        functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        precision = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"--attention={kernel}: PyTorch has no such kernel for {precision} on this {device.type} device; use auto or another kernel."
        ) from error
    finally:
        choose_attention("auto")


def check_compiling(option: str, device: torch.device) -> None:
    """Compile one small layer, so that a missing compiler is noticed before hours of caching. Raises ConfigError."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(f"{option}: torch.compile needs a C++ compiler on a CPU and found none; install g++, or remove this option.")
    try:
        torch.compile(nn.Linear(8, 8, device=device))(torch.zeros(1, 8, device=device))
    except Exception as error:  # torch wraps errors of any kind from its backend
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{option}: torch.compile does not work here ({reason}); remove this option.") from error
