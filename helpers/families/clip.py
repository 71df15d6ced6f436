"""CLIP text encoders, as Stable Diffusion uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, int]:
    """Captions => token ids (B, 77), padded as the tokenizer says, and how many captions were longer than that."""
    ids = tokenizer(
        list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    lengths = (len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids)
    return ids, sum(length > tokenizer.model_max_length for length in lengths)


@torch.no_grad()
def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, 77) => hidden states of the layer before the last, without the final norm (B, 77, D), and the pooled output (B, P)."""
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]
