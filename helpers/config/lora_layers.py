"""The JSON file of --lora_layers: rank, alpha and learning rate for some layers of a LoRA.

    {"attn2": {"rank": 32, "alpha": 32}, "up_blocks\\\\.0": {"lr_scale": 0.5}}

A key is a regular expression that is searched for in the names of the trained layers; the first that is found in a name counts for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config.suggest import did_you_mean
from helpers.foreign_json import parse_json

KEYS = ("rank", "alpha", "lr_scale")


@dataclass(frozen=True)
class LayerRule:
    """What one regular expression sets; None leaves the option's value."""

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    lr_scale: float = 1.0

    def fits(self, layer: str) -> bool:
        return re.search(self.pattern, layer) is not None


def read_lora_layers(path: Path) -> tuple[LayerRule, ...]:
    """The rules in the order of the file. ValueError, a sentence with file and key, where it is no such file."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} holds no rules; write {{"regular expression": {{"rank": 8}}}}.')
    if problem := next((problem for pattern, rule in content.items() for problem in _problems(pattern, rule)), None):
        raise ValueError(f"{path}: {problem}.")
    return tuple(LayerRule(pattern, **rule) for pattern, rule in content.items())


def first_rule(rules: Sequence[LayerRule], layer: str) -> LayerRule | None:
    """The first rule whose expression is found in the name of a layer."""
    return next((rule for rule in rules if rule.fits(layer)), None)


def _problems(pattern: str, rule: Any) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{pattern!r} is not a valid regular expression ({error}); correct it"
    if not isinstance(rule, dict) or not rule:
        yield f"{pattern!r} needs an object with {', '.join(KEYS)}"
        return
    for key, value in rule.items():
        if key not in KEYS:
            yield f"{pattern!r} has the key {key!r}, which is not one of {', '.join(KEYS)}{did_you_mean(key, KEYS)}"
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            yield f"{pattern!r}: {key} is {json.dumps(value)} and must be a number above 0"
        elif key == "rank" and not isinstance(value, int):
            yield f"{pattern!r}: rank is {value:g} and must be a whole number"


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} is there twice")
        seen[key] = value
    return seen
