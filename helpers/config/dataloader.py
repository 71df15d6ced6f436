"""The dataloader JSON -> data sets, with every mistake named by entry, key, file and line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from helpers.config.buckets import bucket_problems, keys_without_a_bucket
from helpers.config.datasets import DataConfig, DatasetConfig, Entry, TextCacheConfig, complete
from helpers.config.declare import Option, options_of
from helpers.config.json_file import JsonDocument, read_json
from helpers.config.suggest import did_you_mean
from helpers.errors import ConfigError

E = TypeVar("E", bound=Entry)
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a list of texts",
    dict: "an object",
}


def read_dataloader(path: Path, options: Mapping[str, Any], base: Path | None = None) -> DataConfig:
    """Read the data sets of a dataloader JSON.

    `options` are the effective options by name, which data sets fall back to; relative paths are taken from `base`, or mean the
    caller's directory. Mistakes are returned in `problems`, never raised.
    """
    try:
        document = read_json(path)
    except ConfigError as error:
        return DataConfig(problems=tuple(error.problems))
    if not isinstance(document.value, list):
        return DataConfig(problems=(f"{path}: holds {_described(document.value)}; it must be a list of data sets: [{{...}}, ...].",))
    reader = _Entries(document, options, base)
    return reader.read()


class _Entries:
    """Reads the entries of one document and collects what is wrong with them."""

    def __init__(self, document: JsonDocument, options: Mapping[str, Any], base: Path | None) -> None:
        self.document = document
        self.options = options
        self.base = base
        self.problems: list[str] = []
        self.notes: list[str] = []

    def read(self) -> DataConfig:
        datasets: list[tuple[int, DatasetConfig]] = []
        texts: list[tuple[int, TextCacheConfig]] = []
        for index, entry in enumerate(self.document.value):
            if not isinstance(entry, dict):
                self._problem(index, "", f"is {_described(entry)}; it must be an object")
            elif self._is_disabled(index, entry) or not self._is_available(index, entry):
                continue
            elif entry.get("dataset_type") == "text_embeds":
                texts.append((index, self._entry(TextCacheConfig, index, entry)))
            else:
                datasets.append((index, self._entry(DatasetConfig, index, entry)))
        caches = self._text_caches(texts)
        complete_sets = tuple(self._dataset(index, dataset, caches) for index, dataset in datasets)
        self._unique_ids([*datasets, *texts])
        if not datasets and not self.problems:
            self.problems.append(f"{self.document.path}: has no enabled image data set; add one with an instance_data_dir.")
        return DataConfig(complete_sets, tuple(caches.values()), tuple(self.problems), tuple(self.notes))

    def _is_disabled(self, index: int, entry: dict[str, Any]) -> bool:
        """A disabled entry is not judged further, so that one can be kept for later."""
        flags = [entry[key] for key in ("disabled", "disable") if key in entry]
        for key in ("disabled", "disable"):
            if key in entry and not isinstance(entry[key], bool):
                self._problem(index, key, f"is {_described(entry[key])}; it must be true or false")
        return any(flag is True for flag in flags)

    def _is_available(self, index: int, entry: dict[str, Any]) -> bool:
        """Whether entries of this kind can be used; if not, that is said once and its other keys are not judged."""
        before = len(self.problems)
        for item in options_of(Entry):
            if item.name in ("type", "dataset_type") and item.name in entry:
                self._value(index, item.name, item, entry[item.name])
        return len(self.problems) == before

    def _entry(self, kind: type[E], index: int, entry: dict[str, Any]) -> E:
        """One entry as an object of `kind`: declared keys taken over or inherited, unknown ones reported."""
        declared = options_of(kind)
        spelling = {name: item for item in declared for name in (item.name, *item.aliases)}
        values: dict[str, Any] = {}
        for key, raw in entry.items():
            item = spelling.get(key)
            if item is None:
                self._problem(index, key, "is not a key of " + _entry_name(kind) + _elsewhere(key, kind, spelling))
            elif item.name in values:
                self._problem(index, key, f"says {item.name} a second time; remove one")
            else:
                values[item.name] = self._value(index, key, item, raw)
        inherited = {item.name: self.options[item.inherits] for item in declared if item.inherits and values.get(item.name) is None}
        return kind(**{key: value for key, value in values.items() if value is not None} | inherited)

    def _value(self, index: int, key: str, item: Option, raw: Any) -> Any:
        """The checked value of one key; None, with the problem noted, where it cannot be used."""
        if raw is None:
            return None
        try:
            value = _typed(item, raw)
            item.check(value)
        except ValueError as error:
            self._problem(index, key, "has a value of the wrong kind" if item.secret else str(error))
            return None
        refusal = item.unavailable(value)
        if refusal:
            self._problem(index, key, refusal)
        elif item.does_nothing and value != item.default:
            self.notes.append(f"{self.document.path.name}: datasets[{index}].{key} does nothing: {item.does_nothing}.")
        if item.kind is Path and self.base is not None:
            return self.base / value
        return value

    def _text_caches(self, found: list[tuple[int, TextCacheConfig]]) -> dict[str, TextCacheConfig]:
        """Text caches by id, with their folders and the default one filled in."""
        defaults = [index for index, text in found if text.default]
        if len(defaults) > 1:
            self._problem(defaults[1], "default", f"is true for datasets[{defaults[0]}] already; there can be one")
        if len(found) > 1 and not defaults:
            self._problem(found[0][0], "default", 'is missing; with several text_embeds entries one must say "default": true')
        caches = {}
        for index, text in found:
            self._require_id(index, text)
            self._check_bucket(index, text)
            if text.type == "aws" and not (text.aws_data_prefix or "").strip("/"):
                self._problem(index, "aws_data_prefix", "is missing; name the folder of the embeddings in the bucket")
            if text.type == "aws" and text.cache_dir is not None:
                self._problem(index, "cache_dir", "is for local folders; embeddings in a bucket are below aws_data_prefix")
            folder = text.cache_dir or self.options["cache_dir_text"]
            caches[text.id] = dataclasses.replace(text, cache_dir=folder, default=text.default or len(found) == 1)
        return caches

    def _dataset(self, index: int, dataset: DatasetConfig, caches: Mapping[str, TextCacheConfig]) -> DatasetConfig:
        self._require_id(index, dataset)
        self._check_bucket(index, dataset)
        if dataset.type == "local":
            self._check_folder(index, dataset)
        folder = self.options["cache_dir_text"]
        wanted = dataset.text_embeds
        if wanted is not None and wanted not in caches:
            self._problem(index, "text_embeds", f"{wanted!r} is not the id of a text_embeds entry{did_you_mean(wanted, caches)}")
        text_entry = None
        for text in caches.values():
            if text.id == wanted or (wanted is None and text.default):
                folder = text.cache_dir
                text_entry = text if text.type == "aws" else None
        entry = self.document.value[index]
        if "minimum_image_size" not in entry and dataset.resolution_type != self.options["resolution_type"]:
            # The option's number is in the option's unit, which is not this data set's.
            dataset = dataclasses.replace(dataset, minimum_image_size=None)
        named = entry.get("cache_dir_vae")
        prefix = named.strip("/") if dataset.type == "aws" and isinstance(named, str) else ""
        return dataclasses.replace(complete(dataset, self.options), text_cache_dir=folder, text_entry=text_entry, latents_prefix=prefix)

    def _require_id(self, index: int, entry: Entry) -> None:
        if not entry.id:
            self._problem(index, "id", "is missing; give every entry a name of its own")

    def _check_bucket(self, index: int, entry: Entry) -> None:
        check = bucket_problems if entry.type == "aws" else keys_without_a_bucket
        for key, what in check(entry, self.document.value[index]):
            self._problem(index, key, what)

    def _check_folder(self, index: int, dataset: DatasetConfig) -> None:
        folder = dataset.instance_data_dir
        if folder is None:
            self._problem(index, "instance_data_dir", "is missing; name the folder of the images")
        elif not os.path.exists(folder):
            self._problem(index, "instance_data_dir", f"there is no folder {folder}; check the path")
        elif not os.path.isdir(folder):
            self._problem(index, "instance_data_dir", f"{folder} is a file; name the folder it is in")

    def _unique_ids(self, entries: list[tuple[int, Any]]) -> None:
        first: dict[str, int] = {}
        for index, entry in sorted(entries, key=lambda pair: pair[0]):
            if entry.id and first.setdefault(entry.id, index) != index:
                self._problem(index, "id", f"{entry.id!r} is the id of datasets[{first[entry.id]}] already; choose another")

    def _problem(self, index: int, key: str, what: str) -> None:
        name, place = (f"datasets[{index}].{key}", (index, key)) if key else (f"datasets[{index}]", (index,))
        self.problems.append(f"{name}{'' if what.startswith('is ') else ':'} {what} ({self.document.where(place)}).")


def _typed(item: Option, raw: Any) -> Any:
    """The JSON value as the key's type; ValueError when it is of another one. Numbers in quotes are refused, not guessed."""
    fits = {
        bool: isinstance(raw, bool),
        int: isinstance(raw, int) and not isinstance(raw, bool),
        float: isinstance(raw, int | float) and not isinstance(raw, bool),
        str: isinstance(raw, str),
        Path: isinstance(raw, str),
        tuple: isinstance(raw, list),
        dict: isinstance(raw, dict),
    }
    if not fits[item.kind] and not item.not_yet:
        raise ValueError(f"is {_described(raw)}; it must be {_KINDS[item.kind]}")
    if item.kind is Path and isinstance(raw, str):
        if "\0" in raw:
            raise ValueError("holds a zero byte, which no path can")
        return Path(raw).expanduser()
    if item.kind is tuple and isinstance(raw, list):
        return tuple(str(element) for element in raw)
    if item.kind is str and isinstance(raw, str):
        return item.spelt.get(raw, raw)
    return float(raw) if item.kind is float and fits[float] else raw


def _described(raw: Any) -> str:
    if raw is None or isinstance(raw, bool):
        return "null" if raw is None else str(raw).lower()
    if isinstance(raw, str):
        return f'the text "{raw if len(raw) <= 40 else raw[:37] + "..."}"'
    if isinstance(raw, dict | list):
        return "an object" if isinstance(raw, dict) else "a list"
    return f"the number {raw}"


def _entry_name(kind: type[Entry]) -> str:
    return "a text_embeds entry" if kind is TextCacheConfig else "an image data set"


def _elsewhere(key: str, kind: type[Entry], spelling: Mapping[str, Option]) -> str:
    """Why an unknown key is there: it belongs to the other kind of entry, or is misspelt."""
    other = DatasetConfig if kind is TextCacheConfig else TextCacheConfig
    if any(key in (item.name, *item.aliases) for item in options_of(other)):
        return f"; it belongs to {_entry_name(other)}"
    return did_you_mean(key, spelling)
