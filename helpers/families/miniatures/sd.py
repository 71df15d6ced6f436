"""Miniatures of Stable Diffusion 1 and 2 and of the SDXL refiner (see tiny.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from helpers.families.miniatures.clip import EOS, clip_config, clip_tokenizer, word_vocabulary
from helpers.families.miniatures.parts import WORDS, save_pipeline, small_vae
from helpers.families.miniatures.sdxl import SDXL_SCHEDULE

WIDTH = 32  # of the text encoders
TIME_ID_WIDTH = 8
# Four levels, of which three have attention, as in the real ones.
SD_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
# SD 1 and 2 keep the beginning of the schedule as a scheduler of their time did.
SD_SCHEDULE: dict[str, Any] = {
    **{name: SDXL_SCHEDULE[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset")},
    "set_alpha_to_one": False,
}


def write_sd1(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of Stable Diffusion 1: CLIP's encoder, epsilon prediction; as many copies, without the safety checker."""
    return _write(
        folder,
        seed,
        lambda vocab, merges: _sd(
            text_encoder=CLIPTextModel(clip_config(len(vocab), WIDTH)),
            tokenizer=clip_tokenizer(vocab, merges, pad=EOS),
            unet=_unet(**SD_LEVELS, attention_head_dim=2),
            scheduler=PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True),
        ),
    )


def write_sd2(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of Stable Diffusion 2.1: OpenCLIP's encoder and "!" as padding, linear projections, velocity prediction."""
    return _write(
        folder,
        seed,
        lambda vocab, merges: _sd(
            text_encoder=CLIPTextModel(clip_config(len(vocab), WIDTH, layers=3, activation="gelu")),
            tokenizer=clip_tokenizer(vocab, merges, pad="!"),
            unet=_unet(**SD_LEVELS, attention_head_dim=(1, 1, 2, 2), use_linear_projection=True),
            scheduler=DDIMScheduler(**SD_SCHEDULE, prediction_type="v_prediction", clip_sample=False),
        ),
    )


def write_sdxl_refiner(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of the SDXL refiner: the second text encoder alone, four levels with attention in the middle two, five numbers."""
    absent: Any = None
    return _write(
        folder,
        seed,
        lambda vocab, merges: StableDiffusionXLImg2ImgPipeline(
            vae=small_vae(scale=0.13025),
            text_encoder=absent,
            tokenizer=absent,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(len(vocab), WIDTH, projection=WIDTH, activation="gelu")),
            tokenizer_2=clip_tokenizer(vocab, merges, pad="!"),
            unet=_unet(
                block_out_channels=(16, 16, 32, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(1, 1, 2, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=TIME_ID_WIDTH,
                projection_class_embeddings_input_dim=WIDTH + 5 * TIME_ID_WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(**SDXL_SCHEDULE),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        ),
    )


def _write(folder: str | Path, seed: int, build: Callable[[dict[str, int], list[tuple[str, str]]], DiffusionPipeline]) -> Path:
    vocab, merges = word_vocabulary(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return save_pipeline(build(vocab, merges), folder)


def _sd(**parts: Any) -> StableDiffusionPipeline:
    absent: Any = None
    return StableDiffusionPipeline(
        vae=small_vae(scale=0.18215), safety_checker=absent, feature_extractor=absent, requires_safety_checker=False, **parts
    )


def _unet(**shape: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8, cross_attention_dim=WIDTH, **shape
    )
