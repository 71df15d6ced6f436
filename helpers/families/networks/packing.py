"""Latents in packs of 2 x 2, one token each, as FLUX.1 reads them; and its pipeline, which gives latents that are not packed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) => (B, h/2 * w/2, 4 C): the tokens row by row, in each the channels, and of each channel the 2 x 2 pixels."""
    squares = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h/2, 2, w/2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`, for latents of this height and width."""
    squares = tokens.unflatten(1, (height // PATCH, width // PATCH)).unflatten(3, (-1, PATCH, PATCH))  # (B, h/2, w/2, C, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@functools.lru_cache(maxsize=64)  # the same few sizes again and again
def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 3): of each token 0, its row and its column, float32 (bfloat16 would round those above 256)."""
    axes = (torch.zeros(1), torch.arange(rows, dtype=torch.float32), torch.arange(columns, dtype=torch.float32))
    return torch.cartesian_prod(*axes).to(device)


class LatentFluxPipeline(FluxPipeline):
    """FluxPipeline whose "latent" images are (B, C, h, w), as those of other pipelines, not packed."""

    def __call__(self, *, width: int, height: int, **arguments: Any) -> Any:
        images: Any = super().__call__(width=width, height=height, **arguments).images
        if arguments.get("output_type") != "latent":
            return FluxPipelineOutput(images=images)
        edge = self.vae_scale_factor * PATCH
        return FluxPipelineOutput(images=unpack(images, height // edge * PATCH, width // edge * PATCH))
