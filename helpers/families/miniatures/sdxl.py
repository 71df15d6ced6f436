"""A miniature of SDXL; see tiny.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from helpers.families.miniatures.clip import EOS, clip_config, clip_tokenizer, word_vocabulary
from helpers.families.miniatures.parts import WORDS, save_pipeline, small_vae

SDXL_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class SdxlSizes:
    """Widths and depths of a miniature SDXL; the shape of the network (three levels, attention in the lower two) stays SDXL's own."""

    unet_channels: tuple[int, int, int] = (16, 32, 32)
    unet_heads: tuple[int, int, int] = (1, 2, 2)  # attention heads a level; the first level has no attention
    unet_layers: int = 1  # residual blocks a level
    unet_transformers: tuple[int, int, int] = (1, 1, 2)  # transformer blocks in each attention layer, a level
    unet_groups: int = 8
    time_id_width: int = 8  # width of the embedding of each of the six size numbers
    text_width: int = 32
    text_2_width: int = 32
    text_layers: int = 2
    text_heads: int = 2
    pooled_width: int = 32
    vae_channels: tuple[int, ...] = (8, 16, 16, 16)  # four levels: 8 times smaller latents
    vae_groups: int = 4
    vae_layers: int = 1


def write_sdxl(
    folder: str | Path,
    *,
    seed: int = 0,
    vocabulary: Sequence[str] = WORDS,
    sizes: SdxlSizes | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Path:
    """Write a miniature SDXL with random weights in diffusers layout => the folder, which `StableDiffusionXLPipeline` loads offline.

    `scheduler` holds noise schedule settings that replace SDXL's own. The same arguments give the same weights.
    """
    return save_sdxl(build_sdxl(seed=seed, vocabulary=vocabulary, sizes=sizes, scheduler=scheduler), folder)


def build_sdxl(
    *,
    seed: int = 0,
    vocabulary: Sequence[str] = WORDS,
    sizes: SdxlSizes | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> StableDiffusionXLPipeline:
    """A miniature SDXL in memory, float32, as `write_sdxl` writes it."""
    sizes = sizes or SdxlSizes()
    vocab, merges = word_vocabulary(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=small_vae(sizes.vae_channels, sizes.vae_groups, sizes.vae_layers, scale=0.13025),
            text_encoder=CLIPTextModel(_text_config(sizes, sizes.text_width, len(vocab), "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(sizes, sizes.text_2_width, len(vocab), "gelu")),
            # SDXL's two tokenizers differ in what they pad with
            tokenizer=clip_tokenizer(vocab, merges, pad=EOS),
            tokenizer_2=clip_tokenizer(vocab, merges, pad="!"),
            unet=_unet(sizes),
            scheduler=EulerDiscreteScheduler(**{**SDXL_SCHEDULE, **(scheduler or {})}),
            add_watermarker=False,
        )


def save_sdxl(pipeline: StableDiffusionXLPipeline, folder: str | Path) -> Path:
    """Write a pipeline of `build_sdxl` as safetensors, with tokenizers that older tools read too."""
    return save_pipeline(pipeline, folder)


def _text_config(sizes: SdxlSizes, width: int, tokens: int, activation: str) -> CLIPTextConfig:
    return clip_config(
        tokens, width, layers=sizes.text_layers, heads=sizes.text_heads, projection=sizes.pooled_width, activation=activation
    )


def _unet(sizes: SdxlSizes) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=sizes.unet_layers,
        transformer_layers_per_block=sizes.unet_transformers,
        attention_head_dim=sizes.unet_heads,  # diffusers' name; for this architecture it counts heads
        norm_num_groups=sizes.unet_groups,
        cross_attention_dim=sizes.text_width + sizes.text_2_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes.time_id_width,
        projection_class_embeddings_input_dim=sizes.pooled_width + 6 * sizes.time_id_width,
    )
