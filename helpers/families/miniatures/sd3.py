"""Miniatures of Stable Diffusion 3 and 3.5 (see tiny.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from helpers.families.tiny import EOS, WORDS, clip_config, clip_tokenizer, save_pipeline, small_vae, word_vocabulary

CLIP_WIDTHS = (24, 32)
TEXT_WIDTH = 64  # T5's; wider than both CLIP encoders together, as in the real ones
SD35: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}  # 3.5 medium; 3.5 large has the norm alone


def write_sd3(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of Stable Diffusion 3, with T5."""
    return _write(folder, seed, with_t5=True)


def write_sd35(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of Stable Diffusion 3.5 medium, whose T5 somebody left out."""
    return _write(folder, seed, with_t5=False, **SD35)


def t5_tokenizer(words: Sequence[str] = WORDS) -> T5TokenizerFast:
    """T5's tokenizer over a vocabulary in which each of `words` is one token, and others are spelt in letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    return T5TokenizerFast(
        vocab=[*pieces, *((f"▁{word}", -2.0) for word in words if len(word) > 1), *((letter, -5.0) for letter in letters)], extra_ids=0
    )


def t5_encoder(tokens: int, width: int) -> T5EncoderModel:
    """A small encoder of T5 1.1 over a vocabulary of `tokens`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=tokens,
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


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
