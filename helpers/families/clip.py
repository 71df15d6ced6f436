"""CLIP text encoders, as Stable Diffusion uses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.families.folder import read_json


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, int]:
    """Captions => token ids (B, 77), padded as the tokenizer says, and how many captions were longer than that."""
    ids = tokenizer(
        list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, sum(length > tokenizer.model_max_length for length in lengths(tokenizer, captions))


def lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, with those for its beginning and end."""
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids] if captions else []


class ClipCaptionLengths:
    """`CaptionLengths` of CLIP tokenizers, loaded when first needed."""

    def __init__(self, folders: Sequence[Path], fingerprint: str) -> None:
        self.folders = folders
        self.fingerprint = fingerprint
        self.limit = min(read_json(folder / "tokenizer_config.json").get("model_max_length", 77) for folder in folders)

    def of(self, captions: Sequence[str]) -> list[int]:
        from transformers import CLIPTokenizer

        tokenizers = [CLIPTokenizer.from_pretrained(folder, local_files_only=True) for folder in self.folders]
        return [max(each) for each in zip(*(lengths(tokenizer, captions) for tokenizer in tokenizers), strict=True)]


@torch.no_grad()
def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, 77) => hidden states of the layer before the last, without the final norm (B, 77, D), and the pooled output (B, P)."""
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]
