"""T5 for miniatures: two vocabularies of a few words, and small encoders."""

from __future__ import annotations

import string
from collections.abc import Sequence

from transformers import T5Config, T5EncoderModel, T5Tokenizer, T5TokenizerFast

from helpers.families.miniatures.parts import WORDS

SPACE = "▁"  # SentencePiece's mark for the beginning of a word


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


def unigram_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """A unigram tokenizer as T5's, in which each of `words` is one token; other text falls apart into characters."""
    whole = ["<pad>", "</s>", "<unk>", *(SPACE + word for word in words)]
    characters = [SPACE, *string.ascii_lowercase, *string.digits, *string.punctuation]
    return T5Tokenizer(vocab=[*((piece, 0.0) for piece in whole), *((piece, -1.0) for piece in characters)], extra_ids=0)


def t5_config(tokens: int, width: int) -> T5Config:
    """A small encoder with the feed-forward layers of T5 1.1, which PixArt and Stable Diffusion 3 use."""
    return T5Config(vocab_size=tokens, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
