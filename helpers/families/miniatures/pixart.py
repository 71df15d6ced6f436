"""Miniatures of PixArt Alpha and Sigma; see tiny.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5EncoderModel

from helpers.families.miniatures.parts import WORDS, small_vae
from helpers.families.miniatures.t5 import t5_config, unigram_tokenizer

TEXT_WIDTH = 32
HEADS, HEAD_WIDTH = 3, 16  # together a multiple of 3: height, width and aspect have a third of the embedding each


def write_pixart_sigma(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of PixArt Sigma: SDXL's VAE, and a network that is not told sizes."""
    return _write(folder, seed, PixArtSigmaPipeline, sample_size=8, told_sizes=False, scale=0.13025)


def write_pixart_alpha(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of PixArt Alpha for 1024 pixels: the VAE of Stable Diffusion 1, and a network that is told height, width and aspect.

    Its `sample_size` is the real one, by which diffusers' pipeline tells sizes or not.
    """
    return _write(folder, seed, PixArtAlphaPipeline, sample_size=128, told_sizes=True, scale=0.18215)


def _write(folder: str | Path, seed: int, pipeline: Callable[..., Any], *, sample_size: int, told_sizes: bool, scale: float) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = unigram_tokenizer(WORDS)
        vae: AutoencoderKL = small_vae(scale=scale)
        parts = pipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(t5_config(len(tokenizer), TEXT_WIDTH)),
            vae=vae,
            transformer=_transformer(sample_size, told_sizes),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        )
        parts.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def _transformer(sample_size: int, told_sizes: bool) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=TEXT_WIDTH,
        num_layers=2,
        in_channels=4,
        out_channels=8,  # the noise, and the variance that this architecture learns beside it
        sample_size=sample_size,
        use_additional_conditions=told_sizes,
    )
