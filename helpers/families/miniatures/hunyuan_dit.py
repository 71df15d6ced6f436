"""Miniatures of Hunyuan-DiT; see tiny.py."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from transformers import BertConfig, BertModel, BertTokenizer, T5EncoderModel

from helpers.families.miniatures.parts import WORDS, small_vae
from helpers.families.miniatures.sdxl import SDXL_SCHEDULE
from helpers.families.miniatures.t5 import t5_config, unigram_tokenizer

TEXT_WIDTH = 32
HEADS, HEAD_WIDTH = 4, 16


def write_hunyuan_dit(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of version 1.2."""
    return _write(folder, seed, size_conditioning=False, beta_end=0.018)


def write_hunyuan_dit_11(folder: str | Path, *, seed: int = 0) -> Path:
    """A miniature of versions 1.0 and 1.1: another schedule, and a network that is told style and sizes."""
    return _write(folder, seed, size_conditioning=True, beta_end=0.03)


def _write(folder: str | Path, seed: int, *, size_conditioning: bool, beta_end: float) -> Path:
    absent: Any = None
    schedule = {**SDXL_SCHEDULE, "beta_end": beta_end, "prediction_type": "v_prediction"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert_words, t5_pieces = bert_tokenizer(WORDS), unigram_tokenizer(WORDS)
        pipeline = HunyuanDiTPipeline(
            vae=small_vae(scale=0.13025),
            text_encoder=BertModel(_bert_config(len(bert_words))),
            tokenizer=bert_words,
            text_encoder_2=T5EncoderModel(t5_config(len(t5_pieces), TEXT_WIDTH)),
            tokenizer_2=t5_pieces,
            transformer=_transformer(size_conditioning),
            scheduler=DDPMScheduler(**schedule, clip_sample=False),
            safety_checker=absent,
            feature_extractor=absent,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def _transformer(size_conditioning: bool) -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        hidden_size=HEADS * HEAD_WIDTH,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=4,  # the first one's result skips to the last
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        use_style_cond_and_image_meta_size=size_conditioning,
    )


def bert_tokenizer(words: Sequence[str]) -> BertTokenizer:
    """BERT's tokenizer, in which each of `words` is one token; other words fall apart into characters."""
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters, *(f"##{character}" for character in characters)]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))})


def _bert_config(tokens: int) -> BertConfig:
    return BertConfig(
        vocab_size=tokens,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * TEXT_WIDTH,
        max_position_embeddings=77,
    )
