"""FLUX.1's text conditioning: CLIP's pooled output, and the states of T5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.hashes import fingerprint
from helpers.families.loading.vae import released
from helpers.families.text.clip import ClipEncoders, ClipOutput
from helpers.families.text.t5 import T5Encoder
from helpers.families.text.t5_source import T5Source


def pooled(outputs: Sequence[ClipOutput]) -> dict[str, Tensor]:
    """{"pooled": (B, P)} of the only encoder."""
    [output] = outputs
    return {"pooled": output.pooled}


class FluxTextEncoders:
    """Captions => {"prompt_embeds": (B, length, 4096), "pooled": (B, 768)}.

    T5 and the network both see the padding as they see tokens, so all of it is cached. `truncated` counts captions that are longer than T5
    reads.
    """

    def __init__(self, clip: ClipEncoders, t5: T5Encoder) -> None:
        self.clip = clip
        self.t5 = t5
        self.fingerprint = fingerprint({"clip": clip.fingerprint, "t5": t5.fingerprint, "family": "flux"})
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), float32 on the CPU."""
        output = self.t5.encode(captions)
        self.truncated += output.too_long
        return {"prompt_embeds": output.states.float().cpu(), **self.clip.encode(captions)}

    def unload(self) -> None:
        self.clip.unload()
        self.t5.unload()


@contextmanager
def text_encoders(base: BaseModel, t5: T5Source, length: int, device: torch.device) -> Iterator[FluxTextEncoders]:
    """The encoders of a base model; they free their weights at the end."""
    clip = ClipEncoders(base, ("",), "last", pooled, device)
    encoders = FluxTextEncoders(clip, T5Encoder(t5, length, masked=False, device=device))
    with released(encoders, device):
        yield encoders
