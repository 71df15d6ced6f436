"""Rank, alpha and learning rate of each layer of a LoRA: the options, or what --lora_layers or the file of --init_lora say of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.config.lora_layers import first_rule, read_lora_layers
from helpers.errors import ConfigError

if TYPE_CHECKING:
    from helpers.config.options import AdapterOptions
    from helpers.methods.lora_init import InitialLora

LARGEST_PATTERN = 400  # names; beyond, they share one expression: PEFT tries each in turn for every layer


@dataclass(frozen=True)
class LayerSettings:
    """A layer's adapter. Its scale is alpha / rank, with rsLoRA alpha / sqrt(rank)."""

    rank: int
    alpha: float
    lr_scale: float = 1.0


class LayerTable:
    """The settings of every layer, by its public name: that of the module, for text encoders with the role in front."""

    def __init__(self, options: AdapterOptions, initial: InitialLora | None) -> None:
        self.options = options
        self.initial = initial
        try:
            self.rules = read_lora_layers(options.lora_layers) if options.lora_layers else ()
        except ValueError as error:
            raise ConfigError(f"--lora_layers: {error}") from error

    def of(self, layer: str) -> LayerSettings:
        rule = first_rule(self.rules, layer)
        rank, alpha = self.options.lora_rank, self.options.lora_alpha
        lr_scale = 1.0 if rule is None else rule.lr_scale
        if self.initial is not None and layer in self.initial.ranks:
            rank = self.initial.ranks[layer]
            if (scale := self.initial.scales.get(layer)) is not None:
                alpha = scale * (math.sqrt(rank) if self.options.use_rslora else rank)
                alpha = self.options.lora_alpha if math.isclose(alpha, self.options.lora_alpha, rel_tol=1e-6) else alpha
        elif rule is not None:
            rank, alpha = rule.rank or rank, rule.alpha or alpha
        return LayerSettings(rank, alpha, lr_scale)

    def require_use(self, layers: Iterable[str]) -> None:
        """Raises ConfigError for an expression that decides about none of the trained layers."""
        names = list(layers)
        used = {rule.pattern for name in names if (rule := first_rule(self.rules, name)) is not None}
        for rule in self.rules:
            if rule.pattern not in used:
                first = any(rule.fits(name) for name in names)
                reason = "only fits layers for which an earlier expression counts" if first else "fits no trained layer"
                raise ConfigError(
                    f"--lora_layers: {rule.pattern!r} in {self.options.lora_layers} {reason}; trained layers are named like {min(names)}."
                )


def patterns(values: Mapping[str, float]) -> dict[str, float]:
    """PEFT's rank_pattern or alpha_pattern: its keys are names of modules, or many names that share a value as one expression."""
    if len(values) <= LARGEST_PATTERN:
        return dict(values)
    shared: dict[float, list[str]] = {}
    for name, value in values.items():
        shared.setdefault(value, []).append(name)
    return {"|".join(names): value for value, names in shared.items()}
