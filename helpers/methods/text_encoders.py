"""Which weights of the text encoders are trained, and their names in files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from helpers.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from helpers.config.options import TextEncoderOptions
    from helpers.protocols import Parts, TextTrainingFamily

_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:text_model\.)?embeddings\.")
_LEVEL = "text_model."  # in transformers 5 only encoders with a projection have this level; in files all have it
WEIGHTS_FILE = "model.safetensors"


def add_text_encoders(parts: Parts, family: TextTrainingFamily, options: TextEncoderOptions, dtype: torch.dtype, freezes: bool) -> None:
    """Load the text encoders into `parts`, with the names of the weights to train.

    With `freezes`, the layers that --freeze_encoder_strategy selects are left out.
    """
    parts.text_encoders = family.load_text_encoders(dtype)
    trained: set[str] = set()
    for role, encoder in parts.text_encoders.items():
        layers, read = encoder.config.num_hidden_layers, family.text_layers_read(role)
        kept = [
            name
            for name, _ in encoder.named_parameters()
            if (place := place_of(name, layers)) < read or read == layers
            if not (freezes and options.freeze_encoder and is_frozen(place, options))
        ]
        trained |= {f"{role}.{name}" for name in kept}
    parts.text_weights = frozenset(trained)


def require_something_to_train(family: TextTrainingFamily, options: TextEncoderOptions) -> None:
    """Raises ConfigError where the options freeze every layer of the text encoder. Loads no weights."""
    layers = family.text_layers_read("text_encoder")
    if options.freeze_encoder and all(is_frozen(place, options) for place in range(layers)):
        raise ConfigError(
            f"--freeze_encoder_strategy={options.freeze_encoder_strategy}, --freeze_encoder_before={options.freeze_encoder_before} "
            f"and --freeze_encoder_after={options.freeze_encoder_after} leave none of the {layers} layers (0 to {layers - 1}) of this "
            "model's text encoder to train; change them, or set --freeze_encoder=false."
        )


def place_of(name: str, layers: int) -> int:
    """The layer that a weight belongs to, from 0; -1 for embeddings, `layers` for what follows the last layer."""
    if found := _LAYER.match(name):
        return int(found[1])
    return -1 if _EMBEDDINGS.match(name) else layers


def is_frozen(place: int, options: TextEncoderOptions) -> bool:
    """Whether --freeze_encoder_strategy and its bounds freeze a layer."""
    before, after = options.freeze_encoder_before, options.freeze_encoder_after
    return {
        "before": place < before,
        "after": place > after,
        "between": before <= place <= after,
        "outside": place < before or place > after,
    }[options.freeze_encoder_strategy]


def name_in_files(name: str) -> str:
    """The name in files of an encoder's module or weight: `encoder.layers.0` => `text_model.encoder.layers.0`."""
    return name if name.startswith((_LEVEL, "text_projection")) else _LEVEL + name


def projections(parts: Parts, role: str, every_linear: bool) -> list[str]:
    """The modules of an encoder's trained layers that get an adapter: the attention projections, or with `every_linear` the MLP too."""
    ending = r"\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])\.weight" if every_linear else r"\.self_attn\.(?:q|k|v|out)_proj\.weight"
    own = sorted(name.removeprefix(f"{role}.") for name in parts.text_weights if name.startswith(f"{role}."))
    return [name.removesuffix(".weight") for name in own if re.search(ending + "$", name)]


def train_only(encoder: nn.Module, names: frozenset[str], role: str) -> dict[str, nn.Parameter]:
    """Unfreeze the named parameters of an encoder and freeze the others. => the named ones, the role in front of their names"""
    encoder.train()
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in encoder.named_parameters():
        full = f"{role}.{name}"
        parameter.requires_grad_(full in names)
        if full in names:
            trained[full] = parameter
    return trained
