"""Miniatures of Stable Diffusion 3 and 3.5 (see tiny.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from helpers.families.miniatures.clip import EOS, clip_config, clip_tokenizer, word_vocabulary
from helpers.families.miniatures.parts import WORDS, save_pipeline, small_vae
from helpers.families.miniatures.t5 import t5_encoder, t5_tokenizer

CLIP_WIDTHS = (24, 32)
TEXT_WIDTH = 64  # T5's; wider than both CLIP encoders together, as in the real ones
SD35: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}  # 3.5 medium; 3.5 large has the norm alone


def write_sd3(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of Stable Diffusion 3, with T5."""
    return _write(folder, seed, with_t5=True)


def write_sd35(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of Stable Diffusion 3.5 medium, whose T5 somebody left out."""
    return _write(folder, seed, with_t5=False, **SD35)


def _write(folder: str | Path, seed: int, *, with_t5: bool, **transformer: Any) -> Path:
    vocab, merges = word_vocabulary(WORDS)
    absent: Any = None
    t5 = t5_tokenizer() if with_t5 else absent
    first, second = (clip_config(len(vocab), width, projection=width) for width in CLIP_WIDTHS)
    second.hidden_act = "gelu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT_WIDTH,
                caption_projection_dim=64,
                pooled_projection_dim=sum(CLIP_WIDTHS),
                pos_embed_max_size=16,
                **transformer,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=small_vae(
                scale=1.5305, shift_factor=0.0609, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True
            ),
            text_encoder=CLIPTextModelWithProjection(first),
            text_encoder_2=CLIPTextModelWithProjection(second),
            text_encoder_3=t5_encoder(len(t5), TEXT_WIDTH) if with_t5 else absent,
            tokenizer=clip_tokenizer(vocab, merges, pad=EOS),
            tokenizer_2=clip_tokenizer(vocab, merges, pad="!"),
            tokenizer_3=t5,
        )
    return save_pipeline(pipeline, folder)
