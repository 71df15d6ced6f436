"""T5 text encoders (Raffel et al., 2020)."""

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
class T5Output:
    """The output of a T5 encoder for B captions, in the encoder's precision and on its device."""

    states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) integers: 1 for a token of the caption or the end token, 0 for padding
    too_long: int  # number of captions that have more than L tokens, end token included


class T5Encoder:
    """A T5 encoder that reads `length` tokens of a caption. It is loaded when the first caption comes.

    With `masked`, its layers do not attend to padding. This must be as in the training of the base model: Stable Diffusion 3 was trained
    without the mask.
    """

    def __init__(self, source: T5Source, length: int, masked: bool, device: torch.device) -> None:
        self.source = source
        self.length = length
        self.masked = masked
        self.device = device
        # Large T5 models overflow in float16.
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        facts = {"weights": source.fingerprint, "dtype": str(self.dtype), "length": length, "masked": masked}
        self.fingerprint = fingerprint(facts)
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> T5Output:
        """B captions => the states of the last layer after its norm, and the mask of their tokens."""
        tokenizer, encoder = self._load()
        ids, mask, too_long = tokenize(tokenizer, captions, self.length)
        attended = mask.to(self.device) if self.masked else None
        states = encoder(ids.to(self.device), attention_mask=attended).last_hidden_state
        return T5Output(states, mask.to(self.device), too_long)

    def unload(self) -> None:
        self._loaded = None

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            encoder = self.source.load(self.dtype)
            # eval: T5 has dropout.
            self._loaded = self.source.load_tokenizer(), encoder.to(self.device).eval().requires_grad_(False)
        return self._loaded


class NormalizedText:
    """The states of T5 for normalized captions and, for networks that do not attend to padding, the mask of their tokens.

    T5 itself never attends to padding here.
    """

    def __init__(self, source: T5Source, length: int, with_mask: bool, device: torch.device) -> None:
        self.t5 = T5Encoder(source, length, masked=True, device=device)
        self.with_mask = with_mask
        # Cache records with a mask are stored without padding, so those without a mask need another fingerprint.
        facts = {"t5": self.t5.fingerprint, "captions": "lower case"} | ({} if with_mask else {"padding": "read"})
        self.fingerprint = fingerprint(facts)
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => {"prompt_embeds": (B, L, D)[, "prompt_embeds_mask": (B, L) of booleans]}, in T5's precision on the CPU."""
        output = self.t5.encode([normalized(caption) for caption in captions])
        self.truncated += output.too_long
        mask = {"prompt_embeds_mask": output.mask.cpu().bool()} if self.with_mask else {}
        return {"prompt_embeds": output.states.cpu(), **mask}

    def unload(self) -> None:
        self.t5.unload()


@contextmanager
def normalized_text(source: T5Source, length: int, with_mask: bool, device: torch.device) -> Iterator[NormalizedText]:
    """`NormalizedText` whose weights are released at the end."""
    with released(NormalizedText(source, length, with_mask, device), device) as encoders:
        yield encoders


def normalized(caption: str) -> str:
    """In lower case and without spaces at the ends, as in the pipelines of PixArt and DeepFloyd."""
    return caption.lower().strip()


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor, int]:
    """Captions => token ids (B, length) that end with an end token or padding, their mask, and how many captions were truncated."""
    tokens = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask, sum(number > length for number in lengths(tokenizer, captions))


def lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """The number of tokens of each caption, end token included."""
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids] if captions else []


class T5CaptionLengths:
    """`CaptionLengths` of a T5 encoder that reads `limit` tokens. The tokenizer is loaded when first needed."""

    def __init__(self, source: T5Source, limit: int) -> None:
        self.source = source
        self.limit = limit
        self.fingerprint = source.tokenizer_fingerprint

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return lengths(self.source.load_tokenizer(), captions)


class NormalizedLengths(T5CaptionLengths):
    """The same for captions that are normalized before they are encoded."""

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return super().token_counts([normalized(caption) for caption in captions])
