"""T5 text encoders (Raffel et al., 2020), as transformers on latents use them beside CLIP or alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.families.loading.hashes import fingerprint
from helpers.families.loading.vae import released
from helpers.families.text.t5_source import T5Source


@dataclass(frozen=True)
class T5Answer:
    """What a T5 encoder gives for B captions, in its own precision and on its device."""

    states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) integers: 1 for a token of the caption or its end, 0 for padding
    too_long: int  # captions that have more than L tokens, their end included


class T5Encoder:
    """A T5 encoder that reads `length` tokens of a caption.

    Loaded by the first caption. `masked` says whether its layers look past the padding, as in the network's own training: Stable
    Diffusion 3 lets them see it.
    """

    def __init__(self, source: T5Source, length: int, masked: bool, device: torch.device) -> None:
        self.source = source
        self.length = length
        self.masked = masked
        self.device = device
        # The large ones overflow in float16.
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        facts = {"weights": source.fingerprint, "dtype": str(self.dtype), "length": length, "masked": masked}
        self.fingerprint = fingerprint(facts)
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
            encoder = self.source.load(self.dtype)
            # In training it has dropout.
            self._loaded = self.source.load_tokenizer(), encoder.to(self.device).eval().requires_grad_(False)
        return self._loaded


class NormalisedText:
    """The states of T5 for normalised captions, with the mask of their tokens where the network does not look at the padding.

    T5 itself looks past it in any case.
    """

    def __init__(self, source: T5Source, length: int, with_mask: bool, device: torch.device) -> None:
        self.t5 = T5Encoder(source, length, masked=True, device=device)
        self.with_mask = with_mask
        # Records without the mask are others: what is cached with one is kept without its padding.
        facts = {"t5": self.t5.fingerprint, "captions": "lower case"} | ({} if with_mask else {"padding": "read"})
        self.fingerprint = fingerprint(facts)
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => {"prompt_embeds": (B, L, D)[, "prompt_embeds_mask": (B, L) of booleans]}, in T5's precision on the CPU."""
        answer = self.t5.answer([normalised(caption) for caption in captions])
        self.truncated += answer.too_long
        mask = {"prompt_embeds_mask": answer.mask.cpu().bool()} if self.with_mask else {}
        return {"prompt_embeds": answer.states.cpu(), **mask}

    def unload(self) -> None:
        self.t5.unload()


@contextmanager
def normalised_text(source: T5Source, length: int, with_mask: bool, device: torch.device) -> Iterator[NormalisedText]:
    """`NormalisedText` that lets its weights go at the end."""
    with released(NormalisedText(source, length, with_mask, device), device) as encoders:
        yield encoders


def normalised(caption: str) -> str:
    """As the pipelines of PixArt and DeepFloyd do before they encode: they were trained on captions without capitals."""
    return caption.lower().strip()


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor, int]:
    """Captions => token ids (B, length) that end with the end of text or padding, their mask, and how many captions are longer."""
    tokens = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask, sum(number > length for number in lengths(tokenizer, captions))


def lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, with that for its end."""
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids] if captions else []


class T5CaptionLengths:
    """`CaptionLengths` of a T5 tokenizer of which `limit` tokens are read; loaded when first needed."""

    def __init__(self, source: T5Source, limit: int) -> None:
        self.source = source
        self.limit = limit
        self.fingerprint = source.tokenizer_fingerprint

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return lengths(self.source.load_tokenizer(), captions)


class NormalisedLengths(T5CaptionLengths):
    """Of captions as they are read where they are normalised."""

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return super().token_counts([normalised(caption) for caption in captions])
