"""T5 text encoders (Raffel et al., 2020), as transformers on latents use them beside CLIP or alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.families import folder
from helpers.families.checkpoint import Checkpoint


@dataclass(frozen=True)
class T5Answer:
    """What a T5 encoder gives for B captions, in its own precision and on its device."""

    states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) integers: 1 for a token of the caption or its end, 0 for padding
    too_long: int  # captions that have more than L tokens, their end included


class T5Encoder:
    """A T5 encoder of a base model that reads `length` tokens of a caption; suffix "_3" is `text_encoder_3` with `tokenizer_3`.

    Loaded by the first caption. `masked` says whether its layers look past the padding, as in the network's own training: Stable
    Diffusion 3 lets them see it.
    """

    def __init__(self, base: Checkpoint, suffix: str, length: int, masked: bool, device: torch.device) -> None:
        self.base = base
        self.encoder_name, self.tokenizer_name = f"text_encoder{suffix}", f"tokenizer{suffix}"
        self.length = length
        self.masked = masked
        self.device = device
        # The large ones overflow in float16.
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        weights = base.hash_of(self.encoder_name, self.tokenizer_name)
        self.fingerprint = folder.fingerprint({"weights": weights, "dtype": str(self.dtype), "length": length, "masked": masked})
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def answer(self, captions: Sequence[str]) -> T5Answer:
        """B captions => the states of the last layer after its norm, with the mask of their tokens."""
        tokenizer, encoder = self._load()
        ids, mask, too_long = tokenize(tokenizer, captions, self.length)
        seen = mask.to(self.device) if self.masked else None
        states = encoder(ids.to(self.device), attention_mask=seen).last_hidden_state
        return T5Answer(states, mask.to(self.device), too_long)

    def unload(self) -> None:
        self._loaded = None

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import T5EncoderModel

            encoder = self.base.load(T5EncoderModel, self.encoder_name, self.dtype)
            tokenizer = load_tokenizer(self.base.folder / self.tokenizer_name)
            self._loaded = tokenizer, encoder.to(self.device).eval().requires_grad_(False)  # in training it has dropout
        return self._loaded


def normalised(caption: str) -> str:
    """As the pipelines of PixArt and DeepFloyd do before they encode: they were trained on captions without capitals."""
    return caption.lower().strip()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a folder, of tokenizer.json or of SentencePiece's spiece.model."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(path, local_files_only=True)


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor, int]:
    """Captions => token ids (B, length) that end with the end of text or padding, their mask, and how many captions are longer."""
    tokens = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask, sum(number > length for number in lengths(tokenizer, captions))


def lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, with that for its end."""
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids] if captions else []


class T5CaptionLengths:
    """`CaptionLengths` of a T5 tokenizer of which `limit` tokens are read; loaded when first needed."""

    def __init__(self, base: Checkpoint, suffix: str, limit: int) -> None:
        self.path = base.folder / f"tokenizer{suffix}"
        self.limit = limit
        self.fingerprint = base.hash_of(f"tokenizer{suffix}")

    def of(self, captions: Sequence[str]) -> list[int]:
        return lengths(load_tokenizer(self.path), captions)


class NormalisedLengths(T5CaptionLengths):
    """Of captions as they are read where they are normalised."""

    def of(self, captions: Sequence[str]) -> list[int]:
        return super().of([normalised(caption) for caption in captions])
