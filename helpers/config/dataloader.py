"""The dataloader JSON -> datasets, with every mistake named by entry, key, file and line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from helpers.config.aspects import map_of, maps_in, read_map
from helpers.config.buckets import bucket_problems, keys_without_a_bucket, without_bucket
from helpers.config.caption_filters import parse_filter, read_filter_file
from helpers.config.datasets import (
    ALPHA,
    DataConfig,
    DatasetConfig,
    Entry,
    JsonCaptionConfig,
    TableConfig,
    TextCacheConfig,
    complete,
)
from helpers.config.declare import Option, options_of
from helpers.config.expansion import expanded, kohya_note, kohya_problems, looks_like_kohya
from helpers.config.json_file import JsonDocument, Place, read_json
from helpers.config.other_names import KEYS, from_another_trainer
from helpers.config.places import placed, text_cache_problems
from helpers.config.sizes import IN_THE_UNIT, size_notes, size_option_notes
from helpers.config.suggest import did_you_mean
from helpers.config.tables import caption_file_problems, table_problems, unused_caption_keys, unused_tables
from helpers.errors import ConfigError

E = TypeVar("E", bound=Entry)
# The keys of an entry of dataset_type conditioning or mask that have an effect: its images decide everything else.
KEYS_OF_MASKS = frozenset(
    ["id", "type", "dataset_type", "disabled", "preserve_data_backend_cache", "skip_file_discovery"]
    + ["instance_data_dir", "path", "split", "image_column", "urls"]
    + [item.name for item in options_of(Entry) if item.name.startswith("aws_")]
)
KEYS_OF_COMPANIONS = {"conditioning": KEYS_OF_MASKS | {"resize_filter"}, "mask": KEYS_OF_MASKS}
NAMED_BY = {"conditioning": "conditioning_data", "mask": "mask_data"}  # dataset_type => the key of an image dataset that names the entry
EMPTY_TEXTS = frozenset(["instance_prompt", "tag_separator"])  # keys for which an empty text is a value
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a list",
    dict: "an object",
}


def read_dataloader(path: Path, options: Mapping[str, Any], base: Path | None = None) -> DataConfig:
    """Read the datasets of a dataloader JSON.

    `options` are the effective options by name, which datasets fall back to; relative paths are taken from `base`, or mean the
    caller's directory. Mistakes are returned in `problems`, never raised.
    """
    try:
        document = read_json(path)
    except ConfigError as error:
        return DataConfig(problems=tuple(error.problems))
    if not isinstance(document.value, list):
        return DataConfig(problems=(f"{path}: holds {_described(document.value)}; it must be a list of datasets: [{{...}}, ...].",))
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
        self.unread: set[tuple[int, str]] = set()  # (entry, key) of values that could not be read
        self.resolutions: dict[int, tuple[float, ...]] = {}  # of entries with several

    def read(self) -> DataConfig:
        datasets: list[tuple[int, DatasetConfig]] = []
        companions: list[tuple[int, DatasetConfig]] = []
        texts: list[tuple[int, TextCacheConfig]] = []
        for index, entry in enumerate(self.document.value):
            if not isinstance(entry, dict):
                self._problem(index, "", f"is {_described(entry)}; it must be an object")
            elif self._is_disabled(index, entry) or not self._is_available(index, entry):
                continue
            elif entry.get("dataset_type") == "text_embeds":
                texts.append((index, self._entry(TextCacheConfig, index, entry)))
            elif entry.get("dataset_type") in KEYS_OF_COMPANIONS:
                companions.append((index, self._entry(DatasetConfig, index, entry)))
            else:
                datasets.append((index, self._entry(DatasetConfig, index, entry)))
        caches = self._text_caches(texts)
        complete_sets = [(index, self._dataset(index, dataset, caches)) for index, dataset in datasets]
        by_id = {found.id: found for found in [self._companions(index, dataset) for index, dataset in companions]}
        complete_sets = [(index, self._with_companions(index, dataset, by_id)) for index, dataset in complete_sets]
        complete_sets = [(index, one) for index, dataset in complete_sets for one in self._expanded(index, dataset)]
        self._unique_ids([*complete_sets, *companions, *texts])
        self._used_companions(companions, [dataset for _, dataset in complete_sets])
        self._epochs_end(datasets)
        self._something_to_learn(datasets)
        self.notes += size_option_notes(self.options, [dataset for _, dataset in complete_sets])
        self._used_maps([dataset for _, dataset in complete_sets])
        if not datasets and not self.problems:
            self.problems.append(f"{self.document.path}: has no enabled image dataset; add one with an instance_data_dir.")
        # What stands in for a value that could not be read would be judged with the others, and told as a second mistake.
        unread = {index for index, _ in self.unread}
        readable = tuple(dataset for index, dataset in complete_sets if index not in unread)
        return DataConfig(readable, tuple(caches.values()), tuple(by_id.values()), tuple(self.problems), tuple(self.notes))

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
            if raw == "" and item is not None and item.kind in (str, Path) and item.name not in EMPTY_TEXTS:
                raw = None  # June 2024's files have empty texts for what is not set
            if item is None:
                self._problem(index, key, "is not a key of " + _entry_name(kind) + _elsewhere(key, kind, spelling))
            elif item.name in values:
                self._problem(index, key, f"says {item.name} a second time; remove one")
            elif raw is not None and item.of_type not in ("", entry.get("type") or "local"):
                self._problem(index, key, f"is a key of type {item.of_type}; remove it, or set type")
            else:
                values[item.name] = self._value(index, key, item, raw)
        inherited = {item.name: self.options[item.inherits] for item in declared if item.inherits and values.get(item.name) is None}
        if (url := values.get("aws_endpoint_url")) and (bucket := values.get("aws_bucket_name")):
            values["aws_endpoint_url"] = without_bucket(url.strip(), bucket)
        return kind(**{key: value for key, value in values.items() if value is not None} | inherited)

    def _value(self, index: int, key: str, item: Option, raw: Any) -> Any:
        """The checked value of one key; None, with the problem noted, where it cannot be used."""
        if raw is None:
            return None
        try:
            if item.kind is TableConfig:
                return self._table(index, key, raw)
            if item.kind is JsonCaptionConfig:
                return JsonCaptionConfig(**self._object(index, key, raw, JsonCaptionConfig, "json"))
            if item.name == "resolution" and isinstance(raw, list):
                return self._several(index, item, raw)
            if item.name == "caption_filter_list":
                return self._filter_lines(raw)
            value = _typed(item, raw)
            item.check(value)
        except ValueError as error:
            self._problem(index, key, "has a value of the wrong kind" if item.secret else str(error))
            self.unread.add((index, item.name))
            return None
        refusal = item.unavailable(value)
        if refusal:
            self._problem(index, key, refusal)
        elif item.does_nothing and value != item.default:
            self.notes.append(f"{self.document.path.name}: datasets[{index}].{key} does nothing: {item.does_nothing}.")
        if item.kind is Path and self.base is not None:
            return self.base / value
        return value

    def _table(self, index: int, key: str, raw: Any) -> TableConfig:
        """The object of a table; its keys are judged as those of an entry are."""
        values = self._object(index, key, raw, TableConfig, "a table")
        if not values.get("path"):
            self._problem(index, f"{key}.path", "is missing; name the table")
        return TableConfig(**values)

    def _object(self, index: int, key: str, raw: Any, kind: type, name: str) -> dict[str, Any]:
        """The values of an object inside an entry, by the names that `kind` declares. `name` is what messages call it."""
        if not isinstance(raw, dict):
            raise ValueError(f"is {_described(raw)}; it must be an object" + (" with a path" if kind is TableConfig else ""))
        declared = {item.name: item for item in options_of(kind)}
        values: dict[str, Any] = {item.name: self.options[item.inherits] for item in declared.values() if item.inherits}
        for key_inside, said in raw.items():
            if key_inside not in declared:
                self._problem(index, f"{key}.{key_inside}", f"is not a key of {name}{did_you_mean(key_inside, declared)}")
            elif (value := self._value(index, f"{key}.{key_inside}", declared[key_inside], said)) is not None:
                values[key_inside] = value
        return values

    def _several(self, index: int, item: Option, raw: list[Any]) -> float:
        """Keep a list of resolutions for `_expanded`, and return the first. ValueError if one of them cannot be used."""
        sizes = [_typed(item, size) for size in raw]
        for size in sizes:
            item.check(size)
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError("is an empty list; name a size" if not sizes else "has a size twice; remove one")
        self.resolutions[index] = tuple(sizes)
        first: float = sizes[0]
        return first

    def _expanded(self, index: int, dataset: DatasetConfig) -> list[DatasetConfig]:
        """The datasets that an entry stands for (see expansion.py)."""
        entry = self.document.value[index]
        sizes = self.resolutions.get(index, ())
        if sizes and dataset.resolution_type != "pixel":
            self._problem(index, "resolution", 'is a list, which needs "resolution_type": "pixel"')
            return [dataset]
        if folder := looks_like_kohya(dataset):
            name = f"{self.document.path.name}: datasets[{index}]"
            what = f"the folders in {dataset.instance_data_dir} have names as in kohya's scripts, such as {folder!r}"
            self.notes.append(
                f'{name}: {what}; "layout": "kohya" uses their numbers as repeats and their names as captions, "plain" ends this line.'
            )
        if dataset.layout == "kohya":
            problems = list(kohya_problems(dataset, entry))
            for key, what in problems:
                self._problem(index, key, what)
            if problems:
                return [dataset]
            if note := kohya_note(dataset):
                self.notes.append(f"{self.document.path.name}: datasets[{index}].layout {note}.")
        return expanded(dataset, entry, sizes, self.options)

    def _filter_lines(self, raw: Any) -> tuple[str, ...]:
        """A list of lines as it stands, or what the file of a path holds. ValueError names the first line that cannot be used."""
        if isinstance(raw, str):
            path = Path(raw).expanduser()
            lines = read_filter_file(path if self.base is None else self.base / path)
        elif isinstance(raw, list) and all(isinstance(line, str) for line in raw):
            lines = tuple(raw)
        else:
            raise ValueError(f"is {_described(raw)}; it must be a list of texts, or the path of a .json or .txt file")
        for line in lines:
            parse_filter(line)
        return lines

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
            for key, what in text_cache_problems(text):
                self._problem(index, key, what)
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
        entry = self.document.value[index]
        dataset, problems = placed(dataset, entry, self.base)
        for key, what in problems:
            if (index, key) not in self.unread:
                self._problem(index, key, what)
        self._check_bucket(index, dataset)
        for key, what in (*table_problems(dataset, entry), *caption_file_problems(dataset, entry)):
            self._problem(index, key, what)
        for key, why in (*unused_tables(dataset), *unused_caption_keys(dataset, entry)):
            self.notes.append(f"{self.document.path.name}: datasets[{index}].{key} does nothing: {why}.")
        folder: Path = self.options["cache_dir_text"]
        filters: tuple[str, ...] = ()
        wanted = dataset.text_embeds
        if wanted is not None and wanted not in caches:
            self._problem(index, "text_embeds", f"{wanted!r} is not the id of a text_embeds entry{did_you_mean(wanted, caches)}")
        text_entry = None
        for text in caches.values():
            if text.id == wanted or (wanted is None and text.default):
                folder, filters = text.cache_dir, text.caption_filter_list
                text_entry = text if text.type == "aws" else None
        named = entry.get("cache_dir_vae")
        return dataclasses.replace(
            self._sizes(index, complete(dataset, self.options)),
            text_cache_dir=folder,
            text_entry=text_entry,
            caption_filters=filters,
            latents_prefix=named.strip("/") if dataset.type == "aws" and isinstance(named, str) else "",
        )

    def _companions(self, index: int, dataset: DatasetConfig) -> DatasetConfig:
        """An entry of dataset_type conditioning or mask: where its images are. Everything else is decided by the images they belong to."""
        self._require_id(index, dataset)
        entry = self.document.value[index]
        for key, what in placed(dataset, entry, self.base)[1]:
            if (index, key) not in self.unread:
                self._problem(index, key, what)
        self._check_bucket(index, dataset)
        for key in entry:
            if key in {item.name for item in options_of(DatasetConfig)} - KEYS_OF_COMPANIONS[dataset.dataset_type]:
                what = "mask" if dataset.dataset_type == "mask" else "conditioning image"
                self.notes.append(f"{self.document.path.name}: datasets[{index}].{key} does nothing: a {what} is cropped as its image is.")
        if dataset.dataset_type == "mask" and dataset.id == ALPHA:
            self._problem(index, "id", f'"mask_data": "{ALPHA}" means the alpha channel of the images; choose another')
        plain: dict[str, Any] = {"caption_strategy": "instanceprompt", "only_instance_prompt": True}  # its captions are nobody's
        return dataclasses.replace(complete(placed(dataset, entry, self.base)[0], self.options), **plain)

    def _with_companions(self, index: int, dataset: DatasetConfig, companions: Mapping[str, DatasetConfig]) -> DatasetConfig:
        """A dataset with the entry that its conditioning_data names, where a ControlNet is trained, and the one its mask_data names."""
        trained = self.options["controlnet"]
        if dataset.resize_filter != "lanczos":
            self._problem(index, "resize_filter", 'is for conditioning sets; put it into the one that "conditioning_data" names')
        if trained and dataset.conditioning_data is None and (index, "conditioning_data") not in self.unread:
            what = "is missing; with --controlnet each dataset names the entry of dataset_type conditioning that holds what to follow"
            self._problem(index, "conditioning_data", what)
        condition, mask = (self._named(index, dataset, kind, companions) for kind in NAMED_BY)
        if condition is not None and not trained:
            self.notes.append(f"{self.document.path.name}: datasets[{index}].conditioning_data does nothing without --controlnet.")
        self._judge_mask(index, dataset, mask)
        return dataclasses.replace(dataset, condition=condition if trained else None, mask=mask)

    def _named(self, index: int, dataset: DatasetConfig, kind: str, companions: Mapping[str, DatasetConfig]) -> DatasetConfig | None:
        """The entry of this dataset_type that a dataset names, if it names one."""
        wanted: str | None = getattr(dataset, NAMED_BY[kind])
        those = {name: entry for name, entry in companions.items() if entry.dataset_type == kind}
        if wanted is None or (kind == "mask" and dataset.alpha_is_mask):
            return None
        if wanted not in those:
            choices = [*those, ALPHA] if kind == "mask" else [*those]
            hint = did_you_mean(wanted, choices)
            self._problem(index, NAMED_BY[kind], f"{wanted!r} is not the id of an entry of dataset_type {kind}{hint}")
        return those.get(wanted)

    def _judge_mask(self, index: int, dataset: DatasetConfig, mask: DatasetConfig | None) -> None:
        """Masks that cannot be meant, or have no effect."""
        if mask is not None and dataset.type == mask.type == "local" and dataset.folder is not None and mask.folder is not None:
            images, masks = dataset.folder.resolve(), mask.folder.resolve()
            if images == masks:
                why = f"{mask.id!r} has the folder of the images themselves, so each image would be its own mask"
                self._problem(index, "mask_data", f"{why}; put the masks into another folder, or use the alpha channels by {ALPHA!r}")
            elif masks.is_relative_to(images):
                what = f"the masks of {mask.id!r} are inside the folder of the images, so they would be trained as images; move them"
                self._problem(index, "mask_data", what)
        why = ""
        if "mask_outside_weight" in self.document.value[index] and dataset.mask_data is None:
            why = "mask_outside_weight does nothing without mask_data"
        elif dataset.mask_data is not None and dataset.mask_outside_weight == 1:
            why = "mask_data does nothing with mask_outside_weight 1: what a mask leaves black counts as much as what it shows white"
        if why:
            self.notes.append(f"{self.document.path.name}: datasets[{index}].{why}.")

    def _used_companions(self, companions: list[tuple[int, DatasetConfig]], datasets: list[DatasetConfig]) -> None:
        for index, entry in companions:
            key = NAMED_BY[entry.dataset_type]
            if entry.id and entry.id not in {getattr(dataset, key) for dataset in datasets}:
                self.notes.append(f"{self.document.path.name}: datasets[{index}] does nothing: no dataset's {key} names it.")

    def _sizes(self, index: int, dataset: DatasetConfig) -> DatasetConfig:
        """The dataset with the sizes that are not its own in its own unit, and with those of the user's file."""
        entry = self.document.value[index]
        if dataset.resolution_type != self.options["resolution_type"]:
            # The options' numbers are in the options' unit, which is not this dataset's.
            foreign: dict[str, Any] = {name: None for name in IN_THE_UNIT if name not in entry}
            dataset = dataclasses.replace(dataset, **foreign)
        self.notes += [f"{self.document.path.name}: datasets[{index}].{note}." for note in size_notes(entry, dataset)]
        try:
            path = map_of(self.options["output_dir"], dataset.resolution)
            if path is None:
                return dataset
            if dataset.resolution_type != "area":
                self.notes.append(f"{path} does nothing for dataset {dataset.id!r}: only sizes of resolution_type area have such a file.")
                return dataset
            sizes = read_map(path, dataset.aspect_bucket_alignment, dataset.aspect_bucket_rounding)
            return dataclasses.replace(dataset, bucket_sizes=sizes)
        except ConfigError as error:
            self.problems += error.problems
            return dataset

    def _used_maps(self, datasets: list[DatasetConfig]) -> None:
        resolutions = {dataset.resolution for dataset in datasets}
        for path, resolution in maps_in(self.options["output_dir"]).items():
            if resolution not in resolutions:
                present = ", ".join(f"{size:g}" for size in sorted(resolutions))
                self.notes.append(f"{path} does nothing: no dataset has the resolution in its name, only {present}.")

    def _require_id(self, index: int, entry: Entry) -> None:
        if not entry.id and (index, "id") not in self.unread:
            self._problem(index, "id", "is missing; give every entry a name of its own")

    def _check_bucket(self, index: int, entry: Entry) -> None:
        check = bucket_problems if entry.type == "aws" else keys_without_a_bucket
        for key, what in check(entry, self.document.value[index]):
            self._problem(index, key, what)

    def _unique_ids(self, entries: list[tuple[int, Any]]) -> None:
        first: dict[str, int] = {}
        for index, entry in sorted(entries, key=lambda pair: pair[0]):
            if entry.id and first.setdefault(entry.id, index) != index:
                self._problem(index, "id", f"{entry.id!r} is the id of datasets[{first[entry.id]}] already; choose another")

    def _epochs_end(self, datasets: list[tuple[int, DatasetConfig]]) -> None:
        """An epoch ends when the sets that count are used up, so there must be one that is drawn from."""
        if not datasets:
            return
        silent = [index for index, dataset in datasets if dataset.probability == 0]
        if len(silent) == len(datasets):
            self._problem(silent[0], "probability", "is 0 here and in every other dataset; give one of them more")
        elif all(dataset.ignore_epochs for _, dataset in datasets):
            self._problem(datasets[0][0], "ignore_epochs", "is true in every dataset, so that no epoch would end; leave it out of one")
        elif all(dataset.ignore_epochs or dataset.probability == 0 for _, dataset in datasets):
            self._problem(silent[0], "probability", "is 0 in every dataset without ignore_epochs, so that no epoch would end; raise one")
        for index, dataset in datasets:
            if dataset.ignore_epochs and dataset.probability == 0 and len(silent) < len(datasets):
                self._problem(
                    index, "probability", "is 0 in a set with ignore_epochs, which would never be seen; raise it, or disable the set"
                )

    def _something_to_learn(self, datasets: list[tuple[int, DatasetConfig]]) -> None:
        if datasets and all(dataset.is_regularisation_data for _, dataset in datasets):
            what = "is true in every dataset, so that there is nothing to learn; leave it out of the set to train on"
            self._problem(datasets[0][0], "is_regularisation_data", what)

    def _problem(self, index: int, key: str, what: str) -> None:
        """Note what is wrong with a key of an entry, such as `crop` or `parquet.path`, or with all of it where the key is ""."""
        place: Place = (index, *key.split(".")) if key else (index,)
        name = f"datasets[{index}].{key}" if key else f"datasets[{index}]"
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
    if item.one_or_many:
        return _texts(raw)
    if not fits[item.kind] and not item.not_yet:
        raise ValueError(f"is {_described(raw)}; it must be {_KINDS[item.kind]}")
    if item.kind is Path and isinstance(raw, str):
        if "\0" in raw:
            raise ValueError("holds a zero byte, which no path can")
        return Path(raw).expanduser()
    if item.kind is tuple and isinstance(raw, list):
        return tuple(_element(item, place, element) for place, element in enumerate(raw))
    if item.kind is str and isinstance(raw, str):
        return item.synonyms.get(raw, raw)
    return float(raw) if item.kind is float and fits[float] else raw


def _element(item: Option, place: int, raw: Any) -> Any:
    try:
        return item.each(raw)
    except ValueError as error:
        raise ValueError(f"element {place} {error}") from None


def _texts(raw: Any) -> tuple[str, ...]:
    """A text or a list of texts as texts."""
    found = [raw] if isinstance(raw, str) else raw
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"is {_described(raw)}; it must be a text or a list of texts")
    return tuple(found)


def _described(raw: Any) -> str:
    if raw is None or isinstance(raw, bool):
        return "null" if raw is None else str(raw).lower()
    if isinstance(raw, str):
        return f'the text "{raw if len(raw) <= 40 else raw[:37] + "..."}"'
    if isinstance(raw, dict | list):
        return "an object" if isinstance(raw, dict) else "a list"
    return f"the number {raw}"


def _entry_name(kind: type[Entry]) -> str:
    return "a text_embeds entry" if kind is TextCacheConfig else "an image dataset"


def _elsewhere(key: str, kind: type[Entry], spelling: Mapping[str, Option]) -> str:
    """Why an unknown key is there: it belongs to the other kind of entry, or is misspelt."""
    other = DatasetConfig if kind is TextCacheConfig else TextCacheConfig
    if any(key in (item.name, *item.aliases) for item in options_of(other)):
        return f"; it belongs to {_entry_name(other)}"
    return from_another_trainer(key, KEYS) or did_you_mean(key, spelling)
