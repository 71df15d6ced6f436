"""Text encoders of Stable Diffusion 3: two CLIP encoders, and an optional T5."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.hashes import fingerprint
from helpers.families.loading.vae import released
from helpers.families.text.clip import ClipEncoders, ClipOutput
from helpers.families.text.t5 import T5Encoder
from helpers.families.text.t5_source import T5Source

CLIPS = ("", "_2")  # suffixes of their folders
T5 = "_3"


def both_pooled(outputs: Sequence[ClipOutput]) -> dict[str, Tensor]:
    """{"clip": (B, 77, sum of D), "pooled": (B, sum of P)}: the states and the pooled outputs of all encoders, concatenated."""
    return {
        "clip": torch.cat([output.states for output in outputs], dim=-1),
        "pooled": torch.cat([output.pooled for output in outputs], dim=-1),
    }


class Sd3TextEncoders:
    """Captions => parts: {"clip": (B, 77, 2048), "pooled": (B, 2048)} and, with T5, {"t5": (B, length, 4096)}.

    The parts are cached, not the result of `joined`: a third of that is padding, and most of it if there is no T5. `truncated` counts
    captions that are too long for T5, or for CLIP if there is no T5.
    """

    def __init__(self, clip: ClipEncoders, t5: T5Encoder | None) -> None:
        self.clip = clip
        self.t5 = t5
        self.fingerprint = fingerprint({"clip": clip.fingerprint, "t5": t5.fingerprint if t5 else None})
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), float32 on the CPU."""
        parts = self.clip.encode(captions)
        if self.t5:
            output = self.t5.encode(captions)
            parts["t5"] = output.states.float().cpu()
            self.truncated += output.too_long
        else:
            self.truncated = self.clip.truncated
        return parts

    def unload(self) -> None:
        self.clip.unload()
        if self.t5:
            self.t5.unload()


@contextmanager
def text_encoders(base: BaseModel, t5: T5Source | None, t5_length: int, device: torch.device) -> Iterator[Sd3TextEncoders]:
    """The CLIP encoders of a base model, and T5 if there is one. Their weights are released at the end."""
    clip = ClipEncoders(base, CLIPS, "penultimate", both_pooled, device)
    encoders = Sd3TextEncoders(clip, T5Encoder(t5, t5_length, masked=False, device=device) if t5 else None)
    with released(encoders, device):
        yield encoders


Configs = Mapping[str, Mapping[str, Any]]  # configs of the CLIP encoders, by folder name


def zeros(clips: Configs, t5: T5Source | None, t5_length: int) -> dict[str, Tensor]:
    """Zeros in the shapes of one caption's parts, without a batch dimension. No encoder is loaded."""
    parts = {
        "clip": torch.zeros(clips["text_encoder"]["max_position_embeddings"], sum(_widths(clips, "hidden_size"))),
        "pooled": torch.zeros(sum(_widths(clips, "projection_dim"))),
    }
    return {**parts, "t5": torch.zeros(t5_length, t5.width)} if t5 else parts


def without(clips: Configs, parts: Mapping[str, Tensor], encoders: Collection[str]) -> dict[str, Tensor]:
    """Parts of one caption, without a batch dimension, with zeros for these encoders, which are named by their folders."""

    def zeroed(part: Tensor, width: str) -> Tensor:
        by_encoder = zip(clips, part.split(_widths(clips, width), dim=-1), strict=True)
        return torch.cat([torch.zeros_like(piece) if name in encoders else piece for name, piece in by_encoder], dim=-1)

    remaining = {**parts, "clip": zeroed(parts["clip"], "hidden_size"), "pooled": zeroed(parts["pooled"], "projection_dim")}
    return {**remaining, "t5": torch.zeros_like(parts["t5"])} if f"text_encoder{T5}" in encoders else remaining


def _widths(clips: Configs, width: str) -> list[int]:
    return [config[width] for config in clips.values()]


def joined(parts: Mapping[str, Tensor], width: int, t5_length: int) -> dict[str, Tensor]:
    """Parts, each (B, ...) => {"prompt_embeds": (B, 77 + t5_length, width), "pooled": (B, P)}, float32.

    CLIP's states, padded with zeros to the width, come before those of T5. Without T5 its states are zeros, as in the pipeline.
    """
    clip, pooled = parts["clip"].float(), parts["pooled"].float()
    t5 = parts["t5"].float() if "t5" in parts else clip.new_zeros(len(clip), t5_length, width)
    padded = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
    return {"prompt_embeds": torch.cat([padded, t5], dim=1), "pooled": pooled}
