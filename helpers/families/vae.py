"""The image codec of latent models: diffusers' AutoencoderKL, loaded when first needed and let go afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class VaeCodec:
    """Pixels to scaled latents and back: latents = (z - shift) * scale, of unit variance for the network.

    `load` gives the VAE in its precision; `fingerprint` is known without loading it. With `deviations` the standard deviation
    of the posterior is encoded too, so that each step can draw its own sample from it.
    """

    def __init__(self, load: Callable[[], Any], config: dict[str, Any], fingerprint: str, device: torch.device, deviations: bool) -> None:
        self._load = load
        self._vae: Any = None
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.fingerprint = fingerprint
        self.device = device
        self.deviations = deviations

    @property
    def vae(self) -> Any:
        if self._vae is None:
            self._vae = self._load().to(self.device).eval().requires_grad_(False)
        return self._vae

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] => {"mean": (B, C, h, w)[, "std": the same]}, float32 on the CPU."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents = {"mean": (posterior.mean.float() - self.shift) * self.scale}
        if self.deviations:
            latents["std"] = posterior.std.float() * self.scale
        return {name: tensor.cpu() for name, tensor in latents.items()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) => pixels (B, 3, H, W) in [-1, 1], float32 on the CPU."""
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.float().clamp(-1, 1).cpu()

    def unload(self) -> None:
        self._vae = None


@contextmanager
def released(holder: Any, device: torch.device) -> Iterator[Any]:
    """Let the weights of a lazy encoder go at the end, whatever happened."""
    try:
        yield holder
    finally:
        holder.unload()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        elif device.type == "mps":
            torch.mps.empty_cache()
