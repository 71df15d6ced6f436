"""Which weights of text encoders move, and the names that files know them by."""

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
_LEVEL = "text_model."  # transformers 5 has it in encoders with a projection alone; files of either have it in both
WEIGHTS_FILE = "model.safetensors"


def add_text_encoders(parts: Parts, family: TextTrainingFamily, options: TextEncoderOptions, dtype: torch.dtype, freezes: bool) -> None:
    """Load the text encoders into `parts`, and say which of their weights may move.

    `freezes` is whether the layers that the options name stay as they are.
    """
    parts.text_encoders = family.load_text_encoders(dtype)
    moving: set[str] = set()
    for role, encoder in parts.text_encoders.items():
        layers, read = encoder.config.num_hidden_layers, family.text_layers_read(role)
        kept = [
            name
            for name, _ in encoder.named_parameters()
            if (place := place_of(name, layers)) < read or read == layers
            if not (freezes and options.freeze_encoder and is_frozen(place, options))
        ]
        moving |= {f"{role}.{name}" for name in kept}
    parts.text_weights = frozenset(moving)


def require_something_to_train(family: TextTrainingFamily, options: TextEncoderOptions) -> None:
    """Raises ConfigError where the options freeze every layer of the text encoder; no weights are loaded for it."""
    layers = family.text_layers_read("text_encoder")
    if options.freeze_encoder and all(is_frozen(place, options) for place in range(layers)):
        raise ConfigError(
            f"--freeze_encoder_strategy={options.freeze_encoder_strategy}, --freeze_encoder_before={options.freeze_encoder_before} "
            f"and --freeze_encoder_after={options.freeze_encoder_after} leave none of the {layers} layers (0 to {layers - 1}) of this "
            "model's text encoder to train; change them, or set --freeze_encoder=false."
        )


def place_of(name: str, layers: int) -> int:
    """The layer that a weight belongs to, from 0; embeddings are at -1, what follows the last layer is at `layers`."""
    if found := _LAYER.match(name):
        return int(found[1])
    return -1 if _EMBEDDINGS.match(name) else layers


def is_frozen(place: int, options: TextEncoderOptions) -> bool:
    """Whether a layer stays as it is by --freeze_encoder_strategy and its bounds."""
    before, after = options.freeze_encoder_before, options.freeze_encoder_after
    return {
        "before": place < before,
        "after": place > after,
        "between": before <= place <= after,
        "outside": place < before or place > after,
    }[options.freeze_encoder_strategy]


def name_in_files(name: str) -> str:
    """A module's or weight's name in an encoder => the one that files have: `encoder.layers.0` => `text_model.encoder.layers.0`."""
    return name if name.startswith((_LEVEL, "text_projection")) else _LEVEL + name


def projections(parts: Parts, role: str, every_linear: bool) -> list[str]:
    """The modules of an encoder's moving layers that get an adapter: the attention's projections, or every linear layer."""
    ending = r"\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])\.weight" if every_linear else r"\.self_attn\.(?:q|k|v|out)_proj\.weight"
    own = sorted(name.removeprefix(f"{role}.") for name in parts.text_weights if name.startswith(f"{role}."))
    return [name.removesuffix(".weight") for name in own if re.search(ending + "$", name)]


def let_move(encoder: nn.Module, names: frozenset[str], role: str) -> dict[str, nn.Parameter]:
    """Have those of an encoder's parameters move, and no others. => them, their names beginning with the role."""
    encoder.train()
    moving: dict[str, nn.Parameter] = {}
    for name, parameter in encoder.named_parameters():
        full = f"{role}.{name}"
        parameter.requires_grad_(full in names)
        if full in names:
            moving[full] = parameter
    return moving
