"""Miniatures of DeepFloyd IF, stage I and II; see tiny.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from transformers import T5EncoderModel

from helpers.families.miniatures.parts import WORDS
from helpers.families.miniatures.t5 import t5_config, unigram_tokenizer

TEXT_WIDTH = 32
COSINE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
# As the checkpoints have it: what a sample is held within, and the variance that the network learns.
SAMPLING: dict[str, Any] = {
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


def write_deepfloyd_1(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of stage I, for pictures of 16 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        IFPipeline(**_parts(), unet=_unet(sample_size=16, in_channels=3)).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def write_deepfloyd_2(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of stage II, from 16 pixels to 64: it sees a second picture, and is told how noisy that is."""
    more: dict[str, Any] = {"class_embed_type": "timestep", "resnet_skip_time_act": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _parts()  # first, so that both stages have the same T5
        unet = _unet(sample_size=64, in_channels=6, **more)
        pipeline = IFSuperResolutionPipeline(**parts, unet=unet, image_noising_scheduler=DDPMScheduler(**COSINE))
        pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def _parts() -> dict[str, Any]:
    """All but the network. No safety checker and no watermark, as many a copy."""
    tokenizer = unigram_tokenizer(WORDS)
    return {
        "tokenizer": tokenizer,
        "text_encoder": T5EncoderModel(t5_config(len(tokenizer), TEXT_WIDTH)),
        "scheduler": DDPMScheduler(**COSINE, **SAMPLING),
        **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker")),
        "requires_safety_checker": False,
    }


def _unet(**shape: Any) -> UNet2DConditionModel:
    """Three levels of the real ones' kinds: attention to text and picture together in the lower two, text in the time embedding too."""
    return UNet2DConditionModel(
        out_channels=6,  # the noise, and the variance
        block_out_channels=(16, 32, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        **shape,
    )
