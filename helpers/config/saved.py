"""The settings of a run as its OUTPUT_DIR/config.json holds them, back as a Config: for programs that look at a run afterwards."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.datasets import DatasetConfig, Entry, JsonCaptionConfig, TableConfig, TextCacheConfig
from helpers.config.declare import options_of
from helpers.config.json_file import read_json
from helpers.config.options import SECTIONS
from helpers.config.sources import Rank
from helpers.errors import ConfigError
from helpers.foreign_json import parse_json

CONFIG = "config.json"
KEYS = ("aws_access_key_id", "aws_secret_access_key")

E = TypeVar("E", bound=Entry)


def read_saved_config(output_dir: Path, axes: Axes) -> Config:
    """The settings that a run was last started with. ConfigError where `output_dir` is no run's, or another version's.

    Paths are as they were given, relative ones to the folder of the start. Secrets are not kept in the file: keys of buckets come from
    the dataloader file of the run, where that is still there and gives them; else the stores ask the environment, as in a run.
    """
    path = output_dir / CONFIG
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{output_dir} holds no {CONFIG}: name the OUTPUT_DIR of a run that has been started.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    try:
        return _config(content, axes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} was not written by this version ({error!r}); start the run once more, and it is written anew."
        ) from error


def _config(content: Mapping[str, Any], axes: Axes) -> Config:
    settings = content["settings"]

    def section(kind: type) -> Any:
        return _restored(kind, {item.name: settings[item.name]["value"] for item in options_of(kind)})

    common = {attribute: section(kind) for attribute, kind in SECTIONS.items()}
    keys = _keys_by_id(settings["data_backend_config"]["value"])

    def restored(kind: type[E], name: str) -> list[E]:
        return [_with_keys(_restored(kind, entry), keys) for entry in content[name]]

    texts = {text.id: text for text in restored(TextCacheConfig, "text_caches")}
    conditions = {entry.id: entry for entry in restored(DatasetConfig, "conditioning")}
    masks = {entry.id: entry for entry in restored(DatasetConfig, "masks")}
    datasets = [  # which hold the ids of other entries as yet
        dataclasses.replace(
            dataset,
            condition=conditions.get(str(dataset.condition)),
            mask=masks.get(str(dataset.mask)),
            text_entry=texts.get(str(dataset.text_entry)),
        )
        for dataset in restored(DatasetConfig, "datasets")
    ]
    return Config(
        **common | {"model": dataclasses.replace(common["model"], family_sections=tuple(map(section, axes.family_sections)))},
        datasets=tuple(datasets),
        text_caches=tuple(texts.values()),
        family_name=content["family"],
        method_name=content["method"],
        objective_name=content["objective"],
        ranks=dict.fromkeys(settings, Rank.VARIABLE),
        origins={name: setting["origin"] for name, setting in settings.items()},
        notes=(),
    )


def _keys_by_id(dataloader: str | None) -> dict[str, Mapping[str, Any]]:
    """Entries of a dataloader file that give both keys of a bucket, by their id; none where the file is gone or no longer reads."""
    try:
        entries = read_json(Path(dataloader or "").expanduser()).value
    except ConfigError:
        return {}
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {str(entry.get("id")): entry for entry in found if all(isinstance(entry.get(key), str) for key in KEYS)}


def _with_keys(entry: E, keys: Mapping[str, Mapping[str, Any]]) -> E:
    """An entry with its keys, unless the file now means another bucket or store: that one's keys are nobody else's business."""
    said = keys.get(entry.id, {})
    place = ("aws_bucket_name", "aws_endpoint_url")
    if not said or any((said.get(name) or None) != (getattr(entry, name) or None) for name in place):
        return entry
    given: dict[str, Any] = {key: said[key] for key in KEYS}
    return dataclasses.replace(entry, **given)


def _restored(section: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from values as JSON holds them."""
    hints = typing.get_type_hints(section)
    known = {field.name for field in dataclasses.fields(section)}
    if unknown := values.keys() - known:
        raise KeyError(min(unknown))
    return section(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    """A value of JSON as its type has it: paths, tuples of them, named tuples, and the objects of tables."""
    if value is None:
        return None
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in kinds:
        if isinstance(value, str) and kind is Path:
            return Path(value)
        if isinstance(value, list) and hasattr(kind, "_make"):
            return kind._make(value)
        if isinstance(value, list) and typing.get_origin(kind) is tuple:
            return tuple(_value(typing.get_args(kind)[0], item) for item in value)
        if isinstance(value, dict) and kind in (TableConfig, JsonCaptionConfig):
            return _restored(kind, value)
    return value
