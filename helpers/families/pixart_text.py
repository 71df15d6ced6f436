"""How PixArt reads captions, and its pipelines from what was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.families import folder
from helpers.families.checkpoint import Checkpoint
from helpers.families.t5 import T5Encoder, normalised


class PixArtText:
    """The states of T5, with the mask of the caption's tokens: the network does not look at the padding."""

    def __init__(self, base: Checkpoint, length: int, device: torch.device) -> None:
        self.t5 = T5Encoder(base, "", length, masked=True, device=device)
        self.fingerprint = folder.fingerprint({"t5": self.t5.fingerprint, "captions": "lower case"})
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => {"prompt_embeds": (B, L, D), "prompt_embeds_mask": (B, L) of booleans}, in T5's precision on the CPU."""
        answer = self.t5.answer([normalised(caption) for caption in captions])
        self.truncated += answer.too_long
        return {"prompt_embeds": answer.states.cpu(), "prompt_embeds_mask": answer.mask.cpu().bool()}

    def unload(self) -> None:
        self.t5.unload()


class FromEmbeddings:
    """A pipeline of PixArt that is called with embeddings, and makes pictures of just the size that is asked for."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.pipeline.set_progress_bar_config(**settings)

    def __call__(self, **arguments: Any) -> Any:
        # Left alone, the negative prompt is "", which contradicts embeddings; and sizes are rounded to those of the authors' buckets.
        return self.pipeline(negative_prompt=None, use_resolution_binning=False, **arguments)
