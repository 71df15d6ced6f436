"""CLIP text encoders, as Stable Diffusion uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

    @torch.no_grad()
    def answers(self, captions: Sequence[str]) -> list[ClipAnswer]:
        """The answer of each encoder; captions that are longer than one of them reads are counted in `truncated`."""
        given, too_long = answers(self._encoders(), captions, self.layer, self.device)
        self.truncated += too_long
        return given

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), float32 on the CPU."""
        return {name: tensor.float().cpu() for name, tensor in self.arrange(self.answers(captions)).items()}

    def unload(self) -> None:
        self._loaded.clear()

    def _encoders(self) -> list[tuple[Any, Any]]:
        if not self._loaded:
            for suffix in self.suffixes:
                encoder = _load(self.base, suffix, self.dtype).to(self.device).eval().requires_grad_(False)
                self._loaded.append((_tokenizer(self.base, suffix), encoder))
        return self._loaded


class TrainedClip:
    """The CLIP encoders of a base model where they are trained: the caller has the modules, and this what `ClipEncoders` makes of them."""

    def __init__(self, base: Checkpoint, suffixes: Sequence[str], layer: Layer, arrange: Arrange) -> None:
        self.base = base
        self.layer = layer
        self.arrange = arrange
        self._tokenizers = {f"text_encoder{suffix}": _tokenizer(base, suffix) for suffix in suffixes}

    def embed(self, encoders: Mapping[str, Any], captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), on the device and differentiable in the encoders' weights."""
        pairs = [(tokenizer, encoders[role]) for role, tokenizer in self._tokenizers.items()]
        return self.arrange(answers(pairs, captions, self.layer, device)[0])


def load_encoders(base: Checkpoint, suffixes: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """CLIP encoders by their folders' names, on the CPU."""
    return {f"text_encoder{suffix}": _load(base, suffix, dtype) for suffix in suffixes}


def _load(base: Checkpoint, suffix: str, dtype: torch.dtype) -> Any:
    import transformers

    name = f"text_encoder{suffix}"
    return base.load(getattr(transformers, base.index[name][1]), name, dtype)


def _tokenizer(base: Checkpoint, suffix: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(base.folder, subfolder=f"tokenizer{suffix}", local_files_only=True)


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


def answers(pairs: Sequence[tuple[Any, Any]], captions: Sequence[str], layer: Layer, device: torch.device) -> tuple[list[ClipAnswer], int]:
    """The answer of each encoder, given beside its tokenizer, and how many captions are longer than one of them reads."""
    given, longest = [], 0
    for tokenizer, encoder in pairs:
        ids, too_long = tokenize(tokenizer, captions)
        given.append(answer(encoder, ids.to(device), layer))
        longest = max(longest, too_long)
    return given, longest


def answer(encoder: Any, ids: Tensor, layer: Layer) -> ClipAnswer:
    """Token ids (B, 77) => the states of a layer and the pooled output, projected where the encoder has a projection."""
    output = encoder(ids, output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return ClipAnswer(output.hidden_states[-2] if layer == "penultimate" else output.last_hidden_state, pooled)
