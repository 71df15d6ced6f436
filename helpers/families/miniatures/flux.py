"""Miniatures of FLUX.1 dev and schnell (see tiny.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from helpers.families.miniatures.clip import EOS, clip_config, clip_tokenizer, word_vocabulary
from helpers.families.miniatures.parts import WORDS, save_pipeline, small_vae
from helpers.families.miniatures.t5 import t5_encoder, t5_tokenizer

CLIP_WIDTH, T5_WIDTH = 32, 48


def write_dev(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of FLUX.1 dev: with an input for guidance, and a shift by the size of the image."""
    return _write(folder, seed, guidance=True, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))


def write_schnell(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of FLUX.1 schnell: without guidance and without a shift."""
    return _write(folder, seed, guidance=False, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))


def _write(folder: str | Path, seed: int, *, guidance: bool, scheduler: FlowMatchEulerDiscreteScheduler) -> Path:
    vocab, merges = word_vocabulary(WORDS)
    t5 = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=CLIP_WIDTH,
                guidance_embeds=guidance,
                axes_dims_rope=(4, 6, 6),
            ),
            scheduler=scheduler,
            vae=small_vae(scale=0.3611, shift_factor=0.1159, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(clip_config(len(vocab), CLIP_WIDTH)),
            tokenizer=clip_tokenizer(vocab, merges, pad=EOS),
            text_encoder_2=t5_encoder(len(t5), T5_WIDTH),
            tokenizer_2=t5,
        )
    return save_pipeline(pipeline, folder)
