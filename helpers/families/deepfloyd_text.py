"""How DeepFloyd IF reads captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.families import folder
from helpers.families.checkpoint import Checkpoint
from helpers.families.t5 import T5Encoder, normalised


class DeepFloydText:
    """The states of T5, those of the padding among them: T5 looks past it, but the network attends to all that it is given."""

    def __init__(self, base: Checkpoint, length: int, device: torch.device) -> None:
        self.t5 = T5Encoder(base, "", length, masked=True, device=device)
        self.fingerprint = folder.fingerprint({"t5": self.t5.fingerprint, "captions": "lower case"})
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => {"prompt_embeds": (B, L, D)}, in T5's precision on the CPU."""
        answer = self.t5.answer([normalised(caption) for caption in captions])
        self.truncated += answer.too_long
        return {"prompt_embeds": answer.states.cpu()}

    def unload(self) -> None:
        self.t5.unload()
