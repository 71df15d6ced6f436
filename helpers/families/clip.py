"""CLIP text encoders, as Stable Diffusion uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from helpers.families import folder
from helpers.families.checkpoint import Checkpoint
from helpers.families.vae import released

Layer = Literal["last", "penultimate"]


@dataclass(frozen=True)
class ClipAnswer:
    """What one encoder gives for B captions, in its own precision and on its device."""

    states: Tensor  # (B, 77, D)
    pooled: Tensor  # (B, P)


Arrange = Callable[[Sequence[ClipAnswer]], dict[str, Tensor]]


def states_of_one(answers: Sequence[ClipAnswer]) -> dict[str, Tensor]:
    """{"prompt_embeds": (B, 77, D)} of the only encoder."""
    [answer] = answers
    return {"prompt_embeds": answer.states}


def states_and_pooled(answers: Sequence[ClipAnswer]) -> dict[str, Tensor]:
    """{"prompt_embeds": (B, 77, sum of D), "pooled": (B, P)}: the states side by side, the pooled output of the last encoder."""
    return {"prompt_embeds": torch.cat([answer.states for answer in answers], dim=-1), "pooled": answers[-1].pooled}


class ClipEncoders:
    """The CLIP encoders of a base model, in order, loaded by the first caption: suffix "" is `text_encoder`, "_2" `text_encoder_2`.

    `layer` says which states: those of the last layer after the final norm, or those that enter that layer, without the norm.
    `arrange` makes of the encoders' answers what is cached by name.
    """

    def __init__(self, base: Checkpoint, suffixes: Sequence[str], layer: Layer, arrange: Arrange, device: torch.device) -> None:
        self.base = base
        self.suffixes = suffixes
        self.layer = layer
        self.arrange = arrange
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        weights = base.hash_of(*(f"text_encoder{suffix}" for suffix in suffixes), *(f"tokenizer{suffix}" for suffix in suffixes))
        self.fingerprint = folder.fingerprint({"weights": weights, "dtype": str(self.dtype), "layer": layer})
        self.truncated = 0
        self._loaded: list[tuple[Any, Any]] = []

    def answers(self, captions: Sequence[str]) -> list[ClipAnswer]:
        """The answer of each encoder; captions that are longer than one of them reads are counted in `truncated`."""
        given, longest = [], 0
        for tokenizer, encoder in self._encoders():
            ids, too_long = tokenize(tokenizer, captions)
            given.append(answer(encoder, ids, self.layer))
            longest = max(longest, too_long)
        self.truncated += longest
        return given

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), float32 on the CPU."""
        return {name: tensor.float().cpu() for name, tensor in self.arrange(self.answers(captions)).items()}

    def unload(self) -> None:
        self._loaded.clear()

    def _encoders(self) -> list[tuple[Any, Any]]:
        if not self._loaded:
            import transformers

            for suffix in self.suffixes:
                name = f"text_encoder{suffix}"
                tokenizer = transformers.CLIPTokenizer.from_pretrained(
                    self.base.folder, subfolder=f"tokenizer{suffix}", local_files_only=True
                )
                encoder = self.base.load(getattr(transformers, self.base.index[name][1]), name, self.dtype)
                self._loaded.append((tokenizer, encoder.to(self.device).eval().requires_grad_(False)))
        return self._loaded


@contextmanager
def clip_encoders(
    base: Checkpoint, suffixes: Sequence[str], layer: Layer, arrange: Arrange, device: torch.device
) -> Iterator[ClipEncoders]:
    """`ClipEncoders` that let their weights go at the end."""
    encoders = ClipEncoders(base, suffixes, layer, arrange, device)
    with released(encoders, device):
        yield encoders


def zeros(base: Checkpoint, suffixes: Sequence[str]) -> dict[str, Tensor]:
    """What `states_and_pooled` gives for a caption, without a batch dimension, of zeros; no encoder is loaded for it."""
    configs = [base.config(f"text_encoder{suffix}") for suffix in suffixes]
    states = torch.zeros(configs[0]["max_position_embeddings"], sum(config["hidden_size"] for config in configs))
    return {"prompt_embeds": states, "pooled": torch.zeros(configs[-1]["projection_dim"])}


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
        self.limit = min(folder.read_json(path / "tokenizer_config.json").get("model_max_length", 77) for path in self.folders)

    def of(self, captions: Sequence[str]) -> list[int]:
        from transformers import CLIPTokenizer

        tokenizers = [CLIPTokenizer.from_pretrained(path, local_files_only=True) for path in self.folders]
        return [max(each) for each in zip(*(lengths(tokenizer, captions) for tokenizer in tokenizers), strict=True)]


def clip_caption_lengths(base: Checkpoint, suffixes: Sequence[str]) -> ClipCaptionLengths:
    """Those of a base model's tokenizers: suffix "" is `tokenizer`, "_2" `tokenizer_2`."""
    names = [f"tokenizer{suffix}" for suffix in suffixes]
    return ClipCaptionLengths([base.folder / name for name in names], base.hash_of(*names))


@torch.no_grad()
def answer(encoder: Any, ids: Tensor, layer: Layer) -> ClipAnswer:
    """Token ids (B, 77) => the states of a layer and the pooled output, projected where the encoder has a projection."""
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return ClipAnswer(output.hidden_states[-2] if layer == "penultimate" else output.last_hidden_state, pooled)
