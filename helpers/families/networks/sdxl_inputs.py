"""Inputs of the networks of SDXL and its refiner: text, sizes and crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.config.declare import FROM_HERE, option
from helpers.data.base.sample import Geometry
from helpers.families.networks import condition
from helpers.families.text import clip_states

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.data.batches import Batch
    from helpers.data.ports import TextTensors


@dataclass(frozen=True)
class SDXLOptions:
    """SDXL: what the network gets besides text."""

    sdxl_original_size: str = option(
        "file",
        "The original size that the network gets: the file's after EXIF rotation, or the resized image's (intermediary).",
        choices=("file", "intermediary"),
    )
    enable_watermark: bool = option(False, "Keep SDXL's invisible watermark in the exported pipeline.", not_yet=True, on_resume=FROM_HERE)


def has_first_encoder(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json names a first text encoder: SDXL has two, its refiner only the second."""
    return bool((index.get("text_encoder") or [None])[0])


def size_and_crop(geometry: Geometry, original_size: str) -> list[int]:
    """[height, width, top, left]: the original size and the crop's corner, in pixels (Podell et al., 2023, section 2.2).

    `original_size` is --sdxl_original_size.
    """
    original = geometry.original if original_size == "file" else geometry.resized
    return [original.height, original.width, geometry.top, geometry.left]


def text_and_numbers(batch: Batch, numbers: Sequence[Sequence[float]], device: torch.device) -> dict[str, Tensor]:
    """Text states, pooled text and the numbers of each sample, in float32.

    The numbers stay float32 up to the sinusoid: in bfloat16 1157 becomes 1160, a different embedding.
    """
    import torch

    return {
        **clip_states.of_batch(batch, device),
        "pooled": batch.text["pooled"].to(device, torch.float32),
        "time_ids": torch.tensor(numbers, dtype=torch.float32, device=device),
    }


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
    arguments: dict[str, Any] = {
        **clip_states.arguments(conditioning),
        "added_cond_kwargs": added,
        **condition.keyword(conditioning),
    }
    return denoiser(noisy, timesteps, **arguments).sample


def prompt_arguments(text: TextTensors, negative: TextTensors) -> dict[str, Any]:
    return {
        **clip_states.prompt_arguments(text, negative),
        "pooled_prompt_embeds": text["pooled"].unsqueeze(0),
        "negative_pooled_prompt_embeds": negative["pooled"].unsqueeze(0),
    }
