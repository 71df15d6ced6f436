"""Where T5 comes from: the base model's own, or the one that --pretrained_t5_model_name_or_path names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families.loading import components, folder
from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.hashes import WeightsHashes
from helpers.families.networks.export import Component, copy_weights

if TYPE_CHECKING:
    from helpers.config.options import ModelOptions

OPTION = "--pretrained_t5_model_name_or_path"
KINDS = ("t5", "mt5")  # `model_type` of what transformers' T5EncoderModel reads; UMT5 is built otherwise
SUFFIXES = ("", "_2", "_3")  # of the encoders in a pipeline, and of their tokenizers
TOKENIZER_FILES = ("added_tokens.json", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
VOCABULARY_FILES = ("spiece.model", "tokenizer.json")  # one of them is there
DECODER = ("decoder.", "lm_head.")  # beginnings of its tensors' names
# What the configs of networks in diffusers call the width of T5's states.
WIDTHS = ("caption_channels", "joint_attention_dim", "cross_attention_dim_t5", "encoder_hid_dim")
CLASSES = ("T5EncoderModel", "T5TokenizerFast")  # of transformers, as model_index.json names them


@dataclass(frozen=True)
class T5Source:
    """A T5 encoder with its tokenizer; no weights are loaded before `load`.

    `suffix` is that of its parts in pipelines of the family: "_3" is `text_encoder_3` with `tokenizer_3`. Where the base model is
    without T5, or has another one, `classes` is what an exported model_index.json says of these parts.
    """

    suffix: str
    encoder: Path  # folder of config.json and weights
    tokenizer: Path  # folder of the tokenizer's files; the same one in many a repository of T5 alone
    variant: str | None
    hashes: WeightsHashes
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, base: BaseModel, suffix: str, options: ModelOptions, width: int) -> T5Source:
        """The T5 that the options name, else the base model's. `width` is that of the states that the network reads (d_model).

        Raises ModelError for a base model without it, and for a source that is no T5, is incomplete or has another width.
        """
        own = (f"text_encoder{suffix}", f"tokenizer{suffix}")
        if not (name := options.pretrained_t5_model_name_or_path):
            components.require_components(base.folder, own, base.variant, options.needs_weights)
            return cls(suffix, base.folder / own[0], base.folder / own[1], base.variant, base.hashes)
        encoder, tokenizer = locate(name, base.variant, options.needs_weights)
        require_width(encoder, width, base.name)
        classes = {part: ["transformers", kind] for part, kind in zip(own, CLASSES, strict=True)}
        return cls(suffix, encoder, tokenizer, base.variant, base.hashes, classes)

    @property
    def width(self) -> int:
        """Of the states, d_model."""
        return int(_config(self.encoder)["d_model"])

    @property
    def fingerprint(self) -> str:
        """Of what is used of encoder and tokenizer, wherever it lies."""
        return self.hashes.hash_files((path.name, path) for path in (*sorted(self._encoder_files()), *self._tokenizer_files()))

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.hashes.hash_files((path.name, path) for path in self._tokenizer_files())

    def load(self, dtype: Any) -> Any:
        """The encoder in this precision, on the CPU."""
        from transformers import T5EncoderModel

        return components.load_component(T5EncoderModel, self.encoder, "", dtype, self.variant)

    def load_tokenizer(self) -> Any:
        """Of tokenizer.json, or of SentencePiece's spiece.model."""
        from transformers import T5TokenizerFast

        return T5TokenizerFast.from_pretrained(self.tokenizer, local_files_only=True)

    @property
    def parts(self) -> Mapping[str, Component]:
        """What writes the parts of an exported pipeline, by name."""
        return {f"text_encoder{self.suffix}": self._save_encoder, f"tokenizer{self.suffix}": self._save_tokenizer}

    def _save_encoder(self, target: Path) -> None:
        """As it is stored; without the decoder, which repositories of T5 alone bring."""
        target.mkdir(parents=True)
        shutil.copyfile(self.encoder / "config.json", target / "config.json")
        weights = components.weight_files(self.encoder, self.variant)
        if any(name.startswith(DECODER) for name in _tensor_names(weights)):
            _save_without_decoder(weights, target / "model.safetensors")
        else:
            copy_weights(weights, self.variant, target)

    def _save_tokenizer(self, target: Path) -> None:
        target.mkdir(parents=True)
        for path in self._tokenizer_files():
            shutil.copyfile(path, target / path.name)

    def _encoder_files(self) -> list[Path]:
        return [self.encoder / "config.json", *components.weight_files(self.encoder, self.variant)]

    def _tokenizer_files(self) -> list[Path]:
        return [path for name in TOKENIZER_FILES if (path := self.tokenizer / name).is_file()]


def locate(name: str, variant: str | None, needs_weights: bool = True) -> tuple[Path, Path]:
    """The folders of the encoder and the tokenizer in a folder or on the hub, from which nothing else is fetched.

    Without `needs_weights` the encoder's are not fetched either: its config tells its width.

    It is a pipeline in diffusers layout, one of whose encoders is a T5, or a T5 alone. Raises ModelError where no whole T5 is there.
    """
    here = Path(name).expanduser()
    get = (lambda *patterns: here) if here.is_dir() else _Hub(name).fetch
    root = get("model_index.json", "config.json", *(f"text_encoder{suffix}/config.json" for suffix in SUFFIXES))
    encoder, suffix = _find_encoder(root, name)
    tokenizer = _find_tokenizer(get, root, suffix, name)
    if needs_weights:
        _find_weights(get, root, encoder, variant, name)
    return encoder, tokenizer


def require_width(encoder: Path, width: int, model: str) -> None:
    """Raises ModelError for a T5 whose states have another width than the network of a model reads."""
    found = _config(encoder)["d_model"]
    if found != width:
        raise ModelError(
            f"{OPTION}: the states of the T5 in {encoder} are {found} wide, and {model} reads {width}: "
            "name a T5 of the size that this base model was trained with."
        )


def width_read(network: Mapping[str, Any]) -> int | None:
    """How wide the states of T5 are that a network of diffusers reads, by its config; None where the config does not tell."""
    return next((network[name] for name in WIDTHS if network.get(name)), None)


Get = Callable[..., Path]  # is told paths in a model, sees to it that those that exist are in its folder, and gives that


def _find_tokenizer(get: Get, root: Path, suffix: str, name: str) -> Path:
    """Beside the encoder's folder, or at the root. Raises ModelError where there is none."""
    places = (root / f"tokenizer{suffix}", root)
    get(*_inside(root, (place / file for place in places for file in TOKENIZER_FILES)))
    for place in places:
        if any((place / file).is_file() for file in VOCABULARY_FILES):
            return place
    raise ModelError(
        f"{OPTION}: there is no tokenizer ({' or '.join(VOCABULARY_FILES)}) with the T5 of {name}, neither in {places[0].name} nor at the "
        "root: name a folder, or a model of the hub, that has both."
    )


def _find_weights(get: Get, root: Path, encoder: Path, variant: str | None, name: str) -> None:
    """Those that are loaded: the variant's, or else the plain ones. Raises ModelError unless they are all there and whole."""
    weights: list[Path] = []
    for kind in (f".{variant}", "") if variant else ("",):
        get(*_inside(root, (encoder / f"model{kind}.safetensors", encoder / f"model.safetensors.index{kind}.json")))
        if weights := components.weight_files(encoder, variant):
            get(*_inside(root, weights))
            break
    if problem := components.weights_problem(encoder, variant):
        raise ModelError(f"{OPTION}: {problem}")
    if not weights or not all(path.is_file() for path in weights):
        raise ModelError(
            f"{OPTION}: the weights of the T5 in {name} are not there as .safetensors, or not all of them, and formats that run code are "
            "not opened: name another copy of it."
        )


def _inside(root: Path, paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


class _Hub:
    """A model on the hub, all of whose files are of the commit that was the newest when it was first asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commit: str | None = None

    def fetch(self, *patterns: str) -> Path:
        snapshot = folder.fetch(OPTION, self.name, patterns, self.commit)
        self.commit = snapshot.name
        return snapshot


def _find_encoder(root: Path, name: str) -> tuple[Path, str]:
    """The folder of the first encoder that is a T5, and the suffix of its tokenizer's. Raises ModelError where there is none."""
    places = {root / f"text_encoder{suffix}": suffix for suffix in SUFFIXES} | {root: ""}
    if (root / "model_index.json").is_file():
        index = folder.model_index(root)
        places = {place: suffix for place, suffix in places.items() if (index.get(place.name) or [None])[0] is not None}
    configs = {place: _config(place) for place in places if (place / "config.json").is_file()}
    for place, config in configs.items():
        if config.get("model_type") in KINDS and "d_model" in config:
            return place, places[place]
    found = " and ".join(str(config.get("model_type")) for config in configs.values())
    raise ModelError(
        f"{OPTION}: {name} is no T5{f' ({found})' if found else ''}: name a pipeline in diffusers layout with a T5 encoder, or a T5 alone."
    )


def _config(place: Path) -> dict[str, Any]:
    return folder.read_json(place / "config.json")


def _save_without_decoder(weights: Sequence[Path], target: Path) -> None:
    from safetensors.torch import load_file

    from helpers.storage.tensors import save_tensors

    files = (path for path in weights if path.suffix == ".safetensors")
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items() if not name.startswith(DECODER)}
    save_tensors(tensors, target)


def _tensor_names(weights: Sequence[Path]) -> list[str]:
    """By the index, or the header of the only file."""
    if weights[0].suffix == ".json":
        return list(folder.read_json(weights[0])["weight_map"])
    from safetensors import safe_open

    with safe_open(weights[0], "pt") as file:
        return list(file.keys())
