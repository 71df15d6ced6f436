"""The settings of a run as its OUTPUT_DIR/config.json holds them, back as a Config: for programs that look at a run afterwards."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.config.config import Config
from helpers.config.datasets import DatasetConfig, TextCacheConfig
from helpers.config.declare import options_of
from helpers.config.options import SECTIONS
from helpers.errors import ConfigError

CONFIG = "config.json"


def read_saved_config(output_dir: Path) -> Config:
    """The settings that a run was last started with. ConfigError where `output_dir` is no run's, or another version's.

    Secrets are not kept in the file, and so they are not set; paths are as they were given, relative ones to the folder of the start.
    """
    path = output_dir / CONFIG
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{output_dir} holds no {CONFIG}: name the OUTPUT_DIR of a run that has been started.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    try:
        return _config(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} was not written by this version ({error!r}); start the run once more, and it is written anew."
        ) from error


def _config(content: Mapping[str, Any]) -> Config:
    settings = content["settings"]
    sections = {
        attribute: _restored(section, {item.name: settings[item.name]["value"] for item in options_of(section)})
        for attribute, section in SECTIONS.items()
    }
    conditions = {entry["id"]: _restored(DatasetConfig, entry) for entry in content.get("conditioning", ())}
    datasets = [_restored(DatasetConfig, entry) for entry in content["datasets"]]
    return Config(
        **sections,
        datasets=tuple(dataclasses.replace(dataset, condition=conditions.get(dataset.condition)) for dataset in datasets),
        text_caches=tuple(_restored(TextCacheConfig, entry) for entry in content["text_caches"]),
        family_name=content["family"],
        method_name=content["method"],
        objective_name=content["objective"],
        given=frozenset(settings),
        origins={name: setting["origin"] for name, setting in settings.items()},
        notes=(),
    )


def _restored(section: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from values as JSON holds them."""
    hints = typing.get_type_hints(section)
    known = {field.name for field in dataclasses.fields(section)}
    if unknown := values.keys() - known:
        raise KeyError(min(unknown))
    return section(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    return value
