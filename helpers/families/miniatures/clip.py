"""CLIP for miniatures: a byte-pair vocabulary of a few words, its tokenizer, and small encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_TOKENS = 77


def word_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP byte-pair vocabulary in which each of `words` is one token => (token to id, merges by priority).

    As in CLIP: all bytes, "!" first as id 0; all bytes that end a word; merged pieces; begin and end of text, which must have
    the highest ids because CLIP pools at the highest id.
    """
    letters = _byte_letters()
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [letters[byte] for byte in word.lower().encode()]
        pieces = _merge([*symbols[:-1], symbols[-1] + END_OF_WORD], merges)
        # A new merge has the lowest priority, so no word that was one token before comes apart.
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges)
    alphabet = list(letters.values())
    merged = dict.fromkeys(left + right for left, right in merges)
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *merged, BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, merges


def write_legacy_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json, merges.txt and special_tokens_map.json, which transformers 4 and many interfaces read, beside tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], *, pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer over a vocabulary of `word_vocabulary`."""
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=pad, model_max_length=MAX_TOKENS
    )


def clip_config(
    tokens: int, width: int, *, layers: int = 2, heads: int = 2, projection: int = 32, activation: str = "quick_gelu"
) -> CLIPTextConfig:
    """A small CLIP text encoder over a vocabulary of `tokens` that ends with begin and end of text."""
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


def _byte_letters() -> dict[int, str]:
    """Byte to visible letter, in CLIP's order: the printable ones as themselves, "!" first; then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _merge(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: apply the merge of highest priority until none fits."""
    priority = {pair: rank for rank, pair in enumerate(merges)}
    while candidates := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in priority]:
        best = min(candidates, key=priority.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces
