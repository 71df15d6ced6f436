"""CLIP text encoders, as the Stable Diffusion models use them."""

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
class ClipOutput:
    """The output of one encoder for B captions, in the encoder's precision and on its device."""

    states: Tensor  # (B, 77, D); (B, 77 N, D) if the longest caption has N chunks
    pooled: Tensor  # (B, P), of the first chunk


Arrange = Callable[[Sequence[ClipOutput]], dict[str, Tensor]]


def states_of_one(outputs: Sequence[ClipOutput]) -> dict[str, Tensor]:
    """{"prompt_embeds": (B, 77, D)} of the only encoder; (B, 77 N, D) in chunks."""
    [output] = outputs
    return {"prompt_embeds": output.states}


def states_and_pooled(outputs: Sequence[ClipOutput]) -> dict[str, Tensor]:
    """{"prompt_embeds": (B, 77, sum of D), "pooled": (B, P)}: the states concatenated, and the pooled output of the last encoder."""
    return {"prompt_embeds": torch.cat([output.states for output in outputs], dim=-1), "pooled": outputs[-1].pooled}


class ClipEncoders:
    """The CLIP text encoders of a base model, loaded when the first caption comes. Suffix "" is `text_encoder`, "_2" `text_encoder_2`.

    `layer` selects the states: "last" after the final norm, or "penultimate", the input of the last layer, without the norm.
    `arrange` turns the encoders' outputs into the tensors that are cached, by name. With `chunked`, long captions are encoded in chunks
    instead of truncated.
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
    def outputs(self, captions: Sequence[str]) -> list[ClipOutput]:
        """The output of each encoder. Captions that are too long for one of them are counted in `truncated`."""
        outputs, too_long = encode_captions(self._encoders(), captions, self.layer, self.device)
        self.truncated += too_long
        return outputs

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), float32 on the CPU. With chunks also the mask of the states of each caption."""
        if self.chunked:
            return self._encode_in_chunks(captions)
        return {name: tensor.float().cpu() for name, tensor in self.arrange(self.outputs(captions)).items()}

    @torch.no_grad()
    def _encode_in_chunks(self, captions: Sequence[str]) -> dict[str, Tensor]:
        outputs, mask = encode_in_chunks(self._encoders(), captions, self.layer, self.device)
        return {**{name: tensor.float().cpu() for name, tensor in self.arrange(outputs).items()}, MASK: mask}

    def unload(self) -> None:
        self._loaded.clear()

    def _encoders(self) -> list[tuple[Any, Any]]:
        if not self._loaded:
            for suffix in self.suffixes:
                encoder = _load(self.base, suffix, self.dtype).to(self.device).eval().requires_grad_(False)
                self._loaded.append((_tokenizer(self.base, suffix), encoder))
        return self._loaded


class TrainedClip:
    """Encodes captions with CLIP text encoders that are being trained, which the caller passes, as `ClipEncoders` does."""

    def __init__(self, base: BaseModel, suffixes: Sequence[str], layer: Layer, arrange: Arrange) -> None:
        self.base = base
        self.layer = layer
        self.arrange = arrange
        self._tokenizers = {f"text_encoder{suffix}": _tokenizer(base, suffix) for suffix in suffixes}

    def embed(self, encoders: Mapping[str, Any], captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...), on the device and differentiable in the encoders' weights."""
        pairs = [(tokenizer, encoders[role]) for role, tokenizer in self._tokenizers.items()]
        return self.arrange(encode_captions(pairs, captions, self.layer, device)[0])


def load_encoders(base: BaseModel, suffixes: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The CLIP text encoders by the names of their folders, on the CPU."""
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
    """`ClipEncoders` whose weights are released at the end."""
    encoders = ClipEncoders(base, suffixes, layer, arrange, device, chunked)
    with released(encoders, device):
        yield encoders


def zeros(base: BaseModel, suffixes: Sequence[str], chunked: bool = False) -> dict[str, Tensor]:
    """Zeros in the shapes of `states_and_pooled` for one caption, without a batch dimension. No encoder is loaded."""
    configs = [base.config(f"text_encoder{suffix}") for suffix in suffixes]
    states = torch.zeros(configs[0]["max_position_embeddings"], sum(config["hidden_size"] for config in configs))
    mask = {MASK: torch.ones(len(states), dtype=torch.bool)} if chunked else {}
    return {STATES: states, "pooled": torch.zeros(configs[-1]["projection_dim"]), **mask}


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, int]:
    """Captions => token ids (B, 77) with the tokenizer's own padding, and the number of captions that were truncated."""
    ids = tokenizer(
        list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, sum(length > tokenizer.model_max_length for length in lengths(tokenizer, captions))


def tokenize_in_chunks(tokenizers: Sequence[Any], captions: Sequence[str]) -> list[list[Tensor]]:
    """For each tokenizer, the token ids (n, 77) of each caption's chunks.

    A chunk is the part of a caption that fits between a start and an end token. A caption has the same number of chunks for all
    tokenizers: those that need fewer add empty ones at the end.
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
    """The number of tokens of each caption, start and end token included."""
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids] if captions else []


class ClipCaptionLengths:
    """`CaptionLengths` of CLIP tokenizers, loaded when first needed. With `chunked` there is no limit."""

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
    """The caption lengths of a base model's tokenizers. Suffix "" is `tokenizer`, "_2" `tokenizer_2`."""
    names = [f"tokenizer{suffix}" for suffix in suffixes]
    return ClipCaptionLengths([base.folder / name for name in names], base.hash_of(*names), chunked)


def encode_in_chunks(
    pairs: Sequence[tuple[Any, Any]], captions: Sequence[str], layer: Layer, device: torch.device
) -> tuple[list[ClipOutput], Tensor]:
    """The output of each encoder, and the mask (B, 77 N) of states that belong to a caption. `pairs` are (tokenizer, encoder).

    The chunks of a caption follow one another. Captions with fewer than N chunks, the most in the batch, are padded with zeros.
    """
    outputs = []
    chunks = tokenize_in_chunks([tokenizer for tokenizer, _ in pairs], captions)
    for (_, encoder), of_captions in zip(pairs, chunks, strict=True):
        counts = [len(ids) for ids in of_captions]
        chunks_output = encode_tokens(encoder, torch.cat(of_captions).to(device), layer)
        joined = [states.flatten(0, 1) for states in chunks_output.states.split(counts)]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        outputs.append(ClipOutput(pad_sequence(joined, batch_first=True), chunks_output.pooled[firsts]))
    mask = pad_sequence([torch.ones(len(states), dtype=torch.bool) for states in joined], batch_first=True)
    return outputs, mask


def encode_captions(
    pairs: Sequence[tuple[Any, Any]], captions: Sequence[str], layer: Layer, device: torch.device
) -> tuple[list[ClipOutput], int]:
    """The output of each encoder, and how many captions are too long for one of them. `pairs` are (tokenizer, encoder)."""
    outputs, most = [], 0
    for tokenizer, encoder in pairs:
        ids, too_long = tokenize(tokenizer, captions)
        outputs.append(encode_tokens(encoder, ids.to(device), layer))
        most = max(most, too_long)
    return outputs, most


def encode_tokens(encoder: Any, ids: Tensor, layer: Layer) -> ClipOutput:
    """Token ids (B, 77) => the states of a layer and the pooled output, projected if the encoder has a projection."""
    output = encoder(ids, output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return ClipOutput(output.hidden_states[-2] if layer == "penultimate" else output.last_hidden_state, pooled)
