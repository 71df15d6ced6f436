"""What all miniatures share: the words of their vocabularies, a small VAE, and how a pipeline is saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from helpers.families.miniatures.clip import write_legacy_tokenizer

WORDS = (
    "a",
    "an",
    "and",
    "at",
    "in",
    "of",
    "on",
    "the",
    "with",
    "photo",
    "picture",
    "painting",
    "background",
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "white",
    "black",
    "gray",
    "cyan",
    "pink",
    "brown",
    "circle",
    "square",
    "triangle",
    "cat",
    "dog",
    "person",
    "house",
    "tree",
    "flower",
    "sky",
    "sea",
    "street",
    "small",
    "large",
)


def save_pipeline(pipeline: Any, folder: str | Path) -> Path:
    """Write a pipeline as safetensors, with CLIP tokenizers that older tools read too => the folder."""
    folder = Path(folder)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, part in pipeline.components.items():
        if isinstance(part, CLIPTokenizer):
            write_legacy_tokenizer(part, folder / name)
    return folder


def small_vae(channels: Sequence[int] = (8, 16, 16, 16), groups: int = 4, layers: int = 1, *, scale: float, **more: Any) -> AutoencoderKL:
    """A VAE of as many levels as `channels`; each level but the last halves the edges. `more` are settings of AutoencoderKL."""
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        sample_size=64,
        scaling_factor=scale,
        **{"latent_channels": 4, **more},
    )
