"""Ways to run a network in less memory or less time that are the device's and not the family's."""

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

# Switches of PyTorch's kernels for attention. They are named for CUDA, and a CPU's obey the same ones.
KERNELS = {
    "flash": cuda.enable_flash_sdp,
    "efficient": cuda.enable_mem_efficient_sdp,
    "cudnn": cuda.enable_cudnn_sdp,
    "math": cuda.enable_math_sdp,
}
HEAD = 64  # width of an attention head, as most networks have


def apply_memory_options(denoiser: Any, options: RunOptions, known: Collection[str]) -> None:
    """Have a network keep and compute as the options say, of which its family knows some."""
    if options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if options.unet_attention_slice and "unet_attention_slice" in known:
        denoiser.set_attention_slice(_half_of_the_heads(denoiser))
    if options.channels_last and "channels_last" in known:
        denoiser.to(memory_format=torch.channels_last)


def _half_of_the_heads(denoiser: Any) -> list[int]:
    """For each attention layer in order, how many heads a slice has: half, as "auto" of diffusers, which makes none of a single one."""
    layers = [layer for layer in denoiser.modules() if layer is not denoiser and hasattr(layer, "set_attention_slice")]
    return [max(1, layer.sliceable_head_dim // 2) for layer in layers]


def choose_attention(kernel: str) -> None:
    """Let this process compute attention by one kernel, and by the one that can do everything where that one cannot."""
    for name, switch in KERNELS.items():
        switch(kernel in ("auto", name) or name == "math")


def check_attention(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where a kernel cannot do the plainest attention on this device in this precision."""
    if kernel == "auto":
        return
    for name, switch in KERNELS.items():
        switch(name == kernel)
    question = torch.zeros(1, 1, 8, HEAD, device=device, dtype=dtype)
    try:
        functional.scaled_dot_product_attention(question, question, question)
    except RuntimeError as error:
        precision = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"--attention={kernel}: PyTorch has no such kernel for {precision} on this {device.type} device; choose auto, or another."
        ) from error
    finally:
        choose_attention("auto")


def check_compiling(option: str, device: torch.device) -> None:
    """Compile one small layer, so that what is missing for it is known before hours of caching. Raises ConfigError."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(f"{option}: torch.compile needs a C++ compiler on a CPU, and there is none; install g++, or leave it out.")
    try:
        torch.compile(nn.Linear(8, 8, device=device))(torch.zeros(1, 8, device=device))
    except Exception as error:  # torch wraps whatever its back end meets
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{option}: torch.compile does not work here ({reason}); leave it out.") from error
