"""Where T5 is loaded from: the base model, or --pretrained_t5_model_name_or_path."""

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
KINDS = ("t5", "mt5")  # values of `model_type` that transformers' T5EncoderModel reads; UMT5 has another architecture
SUFFIXES = ("", "_2", "_3")  # of the encoders in a pipeline, and of their tokenizers
TOKENIZER_FILES = ("added_tokens.json", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
VOCABULARY_FILES = ("spiece.model", "tokenizer.json")  # a tokenizer has at least one of them
DECODER = ("decoder.", "lm_head.")  # prefixes of its tensors
# Names of the width of T5's states in the configs of diffusers' networks.
WIDTHS = ("caption_channels", "joint_attention_dim", "cross_attention_dim_t5", "encoder_hid_dim")
CLASSES = ("T5EncoderModel", "T5TokenizerFast")  # of transformers, as model_index.json names them


@dataclass(frozen=True)
class T5Source:
    """A T5 encoder with its tokenizer. Weights are only loaded by `load`.

    `suffix` is that of its components in pipelines of the family: "_3" stands for `text_encoder_3` and `tokenizer_3`. If the base model has
    no T5, or another one, `classes` are the entries for these components in an exported model_index.json.
    """

    suffix: str
    encoder: Path  # folder of config.json and weights
    tokenizer: Path  # folder of the tokenizer's files; in repositories that contain only a T5, often the same folder
    variant: str | None
    hashes: WeightsHashes
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, base: BaseModel, suffix: str, options: ModelOptions, width: int) -> T5Source:
        """The T5 that the options name, or the base model's own. `width` is the width of the states that the network reads (d_model).

        Raises ModelError if there is none, and for one that is not a T5, is incomplete, or has another width.
        """
        own = (f"text_encoder{suffix}", f"tokenizer{suffix}")
        if not (name := options.pretrained_t5_model_name_or_path):
            components.require_components(base.folder, own, base.variant, options.needs_weights)
            if options.needs_weights:
                base.require_finite(base.folder / own[0])
            return cls(suffix, base.folder / own[0], base.folder / own[1], base.variant, base.hashes)
        encoder, tokenizer = locate(name, base.variant, options.needs_weights)
        require_width(encoder, width, base.name)
        if options.needs_weights:
            base.require_finite(encoder)
        classes = {part: ["transformers", kind] for part, kind in zip(own, CLASSES, strict=True)}
        return cls(suffix, encoder, tokenizer, base.variant, base.hashes, classes)

    @property
    def width(self) -> int:
        """The width of the states (d_model)."""
        return int(_config(self.encoder)["d_model"])

    @property
    def fingerprint(self) -> str:
        """Of the files of encoder and tokenizer that are used. It does not depend on their location."""
        return self.hashes.hash_files((path.name, path) for path in (*sorted(self._encoder_files()), *self._tokenizer_files()))

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.hashes.hash_files((path.name, path) for path in self._tokenizer_files())

    def load(self, dtype: Any) -> Any:
        """The encoder in this precision, on the CPU."""
        from transformers import T5EncoderModel

        return components.load_component(T5EncoderModel, self.encoder, "", dtype, self.variant)

    def load_tokenizer(self) -> Any:
        """From tokenizer.json, or from SentencePiece's spiece.model."""
        from transformers import T5TokenizerFast

        return T5TokenizerFast.from_pretrained(self.tokenizer, local_files_only=True)

    @property
    def parts(self) -> Mapping[str, Component]:
        """The components of an exported pipeline, by name."""
        return {f"text_encoder{self.suffix}": self._save_encoder, f"tokenizer{self.suffix}": self._save_tokenizer}

    def _save_encoder(self, target: Path) -> None:
        """In its stored precision, without the decoder that repositories of a whole T5 contain."""
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
    """The folders of the encoder and the tokenizer, for a local folder or a model on the hub. Nothing else is downloaded.

    `name` is a pipeline in diffusers layout with a T5 text encoder, or a T5 alone. Without `needs_weights`, weights are not downloaded,
    because the config says the width. Raises ModelError if there is no complete T5.
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
    """Raises ModelError for a T5 whose states have another width than those that the network reads."""
    found = _config(encoder)["d_model"]
    if found != width:
        raise ModelError(
            f"{OPTION}: the states of the T5 in {encoder} have width {found}, but {model} needs width {width}. "
            "Name a T5 of the size that this base model was trained with."
        )


def width_read(network: Mapping[str, Any]) -> int | None:
    """The width of the T5 states that a network of diffusers reads. None if its config does not say."""
    return next((network[name] for name in WIDTHS if network.get(name)), None)


Get = Callable[..., Path]  # (*paths in a model) => the model's folder, in which those of the paths that exist have been downloaded


def _find_tokenizer(get: Get, root: Path, suffix: str, name: str) -> Path:
    """The tokenizer's folder: next to the encoder's folder, or the root. Raises ModelError if there is none."""
    places = (root / f"tokenizer{suffix}", root)
    get(*_inside(root, (place / file for place in places for file in TOKENIZER_FILES)))
    for place in places:
        if any((place / file).is_file() for file in VOCABULARY_FILES):
            return place
    raise ModelError(
        f"{OPTION}: {name} has a T5 but no tokenizer ({' or '.join(VOCABULARY_FILES)}), neither in {places[0].name} nor at the root. "
        "Name a folder or a model on the hub that has both."
    )


def _find_weights(get: Get, root: Path, encoder: Path, variant: str | None, name: str) -> None:
    """Download the weights: the variant's, or those without a variant. Raises ModelError if some are missing or damaged."""
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
            f"{OPTION}: {name} does not contain all weights of the T5 as .safetensors, and formats that can run code are not opened. "
            "Name another copy of it."
        )


def _inside(root: Path, paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


class _Hub:
    """A model on the hub. All files are taken from the same commit, the newest one at the first request."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commit: str | None = None

    def fetch(self, *patterns: str) -> Path:
        snapshot = folder.fetch(OPTION, self.name, patterns, self.commit)
        self.commit = snapshot.name
        return snapshot


def _find_encoder(root: Path, name: str) -> tuple[Path, str]:
    """The folder of the first encoder that is a T5, and the suffix of its tokenizer. Raises ModelError if there is none."""
    places = {root / f"text_encoder{suffix}": suffix for suffix in SUFFIXES} | {root: ""}
    if (root / "model_index.json").is_file():
        index = folder.model_index(root)
        places = {place: suffix for place, suffix in places.items() if (index.get(place.name) or [None])[0] is not None}
    configs = {place: _config(place) for place in places if (place / "config.json").is_file()}
    for place, config in configs.items():
        if config.get("model_type") in KINDS and "d_model" in config:
            return place, places[place]
    found = ", ".join(str(config.get("model_type")) for config in configs.values())
    raise ModelError(
        f"{OPTION}: {name} is not a T5{f' ({found})' if found else ''}. Name a T5, or a pipeline in diffusers layout with a T5 encoder."
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
    """From the index, or from the header of the only file."""
    if weights[0].suffix == ".json":
        return list(folder.read_json(weights[0])["weight_map"])
    from safetensors import safe_open

    with safe_open(weights[0], "pt") as file:
        return list(file.keys())
