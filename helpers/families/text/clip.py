"""CLIP text encoders, as Stable Diffusion uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpers.families.loading import folder
from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.hashes import fingerprint
from helpers.families.loading.vae import released
from helpers.families.text.clip_states import MASK, STATES

Layer = Literal["last", "penultimate"]


@dataclass(frozen=True)
class ClipAnswer:
    """What one encoder gives for B captions, in its own precision and on its device."""

    states: Tensor  # (B, 77, D), or of as many chunks as the longest caption has, (B, 77 N, D)
    pooled: Tensor  # (B, P), of the first chunk


Arrange = Callable[[Sequence[ClipAnswer]], dict[str, Tensor]]


def states_of_one(answers: Sequence[ClipAnswer]) -> dict[str, Tensor]:
    """{"prompt_embeds": (B, 77, D)} of the only encoder, more of them in chunks."""
    [answer] = answers
    return {"prompt_embeds": answer.states}


def states_and_pooled(answers: Sequence[ClipAnswer]) -> dict[str, Tensor]:
    """{"prompt_embeds": (B, 77, sum of D), "pooled": (B, P)}: the states side by side, the pooled output of the last encoder."""
    return {"prompt_embeds": torch.cat([answer.states for answer in answers], dim=-1), "pooled": answers[-1].pooled}


class ClipEncoders:
    """The CLIP encoders of a base model, in order, loaded by the first caption: suffix "" is `text_encoder`, "_2" `text_encoder_2`.

    `layer` says which states: those of the last layer after the final norm, or those that enter that layer, without the norm.
    `arrange` makes of the encoders' answers what is cached by name. `chunked` is whether long captions are encoded in chunks rather than
    cut off.
    """

    def __init__(
        self, base: BaseModel, suffixes: Sequence[str], layer: Layer, arrange: Arrange, device: torch.device, chunked: bool = False
    ) -> None:
        self.base = base
        self.suffixes = suffixes
        self.layer = layer
        self.arrange = arrange
        self.device = device
        self.chunked = chunked
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        weights = base.hash_of(*(f"text_encoder{suffix}" for suffix in suffixes), *(f"tokenizer{suffix}" for suffix in suffixes))
        facts = {"weights": weights, "dtype": str(self.dtype), "layer": layer}
        self.fingerprint = fingerprint(facts | ({"long captions": "chunk"} if chunked else {}))
        self.truncated = 0
        self._loaded: list[tuple[Any, Any]] = []

    @torch.no_grad()
    def answers(self, captions: Sequence[str]) -> list[ClipAnswer]:
        """The answer of each encoder; captions that are longer than one of them reads are counted in `truncated`."""
        given, too_long = answers(self._encoders(), captions, self.layer, self.device)
        self.truncated += too_long
        return given

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), float32 on the CPU; in chunks, also which states are of each caption."""
        if self.chunked:
            return self._encode_in_chunks(captions)
        return {name: tensor.float().cpu() for name, tensor in self.arrange(self.answers(captions)).items()}

    @torch.no_grad()
    def _encode_in_chunks(self, captions: Sequence[str]) -> dict[str, Tensor]:
        given, there = answers_in_chunks(self._encoders(), captions, self.layer, self.device)
        return {**{name: tensor.float().cpu() for name, tensor in self.arrange(given).items()}, MASK: there}

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

    def __init__(self, base: BaseModel, suffixes: Sequence[str], layer: Layer, arrange: Arrange) -> None:
        self.base = base
        self.layer = layer
        self.arrange = arrange
        self._tokenizers = {f"text_encoder{suffix}": _tokenizer(base, suffix) for suffix in suffixes}

    def embed(self, encoders: Mapping[str, Any], captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), on the device and differentiable in the encoders' weights."""
        pairs = [(tokenizer, encoders[role]) for role, tokenizer in self._tokenizers.items()]
        return self.arrange(answers(pairs, captions, self.layer, device)[0])


def load_encoders(base: BaseModel, suffixes: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """CLIP encoders by their folders' names, on the CPU."""
    return {f"text_encoder{suffix}": _load(base, suffix, dtype) for suffix in suffixes}


def _load(base: BaseModel, suffix: str, dtype: torch.dtype) -> Any:
    import transformers

    name = f"text_encoder{suffix}"
    return base.load(getattr(transformers, base.index[name][1]), name, dtype)


def _tokenizer(base: BaseModel, suffix: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(base.folder, subfolder=f"tokenizer{suffix}", local_files_only=True)


@contextmanager
def clip_encoders(
    base: BaseModel, suffixes: Sequence[str], layer: Layer, arrange: Arrange, device: torch.device, chunked: bool = False
) -> Iterator[ClipEncoders]:
    """`ClipEncoders` that let their weights go at the end."""
    encoders = ClipEncoders(base, suffixes, layer, arrange, device, chunked)
    with released(encoders, device):
        yield encoders


def zeros(base: BaseModel, suffixes: Sequence[str], chunked: bool = False) -> dict[str, Tensor]:
    """What `states_and_pooled` gives for a caption, without a batch dimension, of zeros; no encoder is loaded for it."""
    configs = [base.config(f"text_encoder{suffix}") for suffix in suffixes]
    states = torch.zeros(configs[0]["max_position_embeddings"], sum(config["hidden_size"] for config in configs))
    mask = {MASK: torch.ones(len(states), dtype=torch.bool)} if chunked else {}
    return {STATES: states, "pooled": torch.zeros(configs[-1]["projection_dim"]), **mask}


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, int]:
    """Captions => token ids (B, 77), padded as the tokenizer says, and how many captions were longer than that."""
    ids = tokenizer(
        list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, sum(length > tokenizer.model_max_length for length in lengths(tokenizer, captions))


def tokenize_in_chunks(tokenizers: Sequence[Any], captions: Sequence[str]) -> list[list[Tensor]]:
    """For each tokenizer the token ids of each caption's chunks, (n, 77).

    A chunk is what fits between the marks of a beginning and an end. All tokenizers have equally many of a caption: one that needs fewer
    has empty ones at the end.
    """
    pieces = [[_pieces(tokenizer, caption) for caption in captions] for tokenizer in tokenizers]
    counts = [max(map(len, of_caption)) for of_caption in zip(*pieces, strict=True)]
    return [
        [
            torch.tensor([_marked(tokenizer, piece) for piece in [*own, *[[]] * (count - len(own))]])
            for own, count in zip(of_tokenizer, counts, strict=True)
        ]
        for tokenizer, of_tokenizer in zip(tokenizers, pieces, strict=True)
    ]


def _pieces(tokenizer: Any, caption: str) -> list[list[int]]:
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    return [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]


def _marked(tokenizer: Any, piece: Sequence[int]) -> list[int]:
    ids = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))


def lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, with those for its beginning and end."""
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids] if captions else []


class ClipCaptionLengths:
    """`CaptionLengths` of CLIP tokenizers, loaded when first needed. In chunks captions of any length are read."""

    def __init__(self, folders: Sequence[Path], fingerprint: str, chunked: bool = False) -> None:
        self.folders = folders
        self.fingerprint = fingerprint
        self.limit = (
            None if chunked else min(folder.read_json(path / "tokenizer_config.json").get("model_max_length", 77) for path in self.folders)
        )

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        from transformers import CLIPTokenizer

        tokenizers = [CLIPTokenizer.from_pretrained(path, local_files_only=True) for path in self.folders]
        return [max(each) for each in zip(*(lengths(tokenizer, captions) for tokenizer in tokenizers), strict=True)]


def clip_caption_lengths(base: BaseModel, suffixes: Sequence[str], chunked: bool = False) -> ClipCaptionLengths:
    """Those of a base model's tokenizers: suffix "" is `tokenizer`, "_2" `tokenizer_2`."""
    names = [f"tokenizer{suffix}" for suffix in suffixes]
    return ClipCaptionLengths([base.folder / name for name in names], base.hash_of(*names), chunked)


def answers_in_chunks(
    pairs: Sequence[tuple[Any, Any]], captions: Sequence[str], layer: Layer, device: torch.device
) -> tuple[list[ClipAnswer], Tensor]:
    """The answer of each encoder, given beside its tokenizer, and which states are there (B, 77 N): a caption's chunks one after another,
    zeros behind those of captions that have fewer than the N of the longest.
    """
    given = []
    chunks = tokenize_in_chunks([tokenizer for tokenizer, _ in pairs], captions)
    for (_, encoder), of_captions in zip(pairs, chunks, strict=True):
        counts = [len(ids) for ids in of_captions]
        each = answer(encoder, torch.cat(of_captions).to(device), layer)
        joined = [states.flatten(0, 1) for states in each.states.split(counts)]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        given.append(ClipAnswer(pad_sequence(joined, batch_first=True), each.pooled[firsts]))
    there = pad_sequence([torch.ones(len(states), dtype=torch.bool) for states in joined], batch_first=True)
    return given, there


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
