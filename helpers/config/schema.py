"""Keys of the dataloader JSON -> a JSON Schema (draft 7, which editors know best), for completion and for marks under mistakes.

It says no more than the reader: what the reader takes, the schema takes. What needs the disk or other entries only the reader judges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.config.datasets import DatasetConfig, Entry, JsonCaptionConfig, TableConfig, TextCacheConfig
from helpers.config.declare import Option, options_of
from helpers.config.sources import REPOSITORY

SCHEMA_JSON = REPOSITORY / "documentation" / "dataloader.schema.json"

Schema = dict[str, Any]

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", tuple: "array", dict: "object"}


def schema_text() -> str:
    """The whole of dataloader.schema.json."""
    return json.dumps(dataloader_schema(), indent=2, ensure_ascii=False) + "\n"


def dataloader_schema() -> Schema:
    """A list of entries, of which disabled ones may say anything."""
    kinds = {
        "if": _says("dataset_type", "text_embeds"),
        "then": {"$ref": "#/definitions/text_embeds"},
        "else": {"$ref": "#/definitions/image"},
    }
    disabled = {"anyOf": [_says("disabled", True), _says("disable", True)]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "SimpleTuner datasets",
        "description": "Generated from helpers/config/datasets.py by ./simpletuner document; see documentation/DATALOADER.md.",
        "allowComments": True,  # these two are for VS Code, and mean what the reader allows
        "allowTrailingCommas": True,
        "type": "array",
        "items": {"type": "object", "if": disabled, "else": kinds},
        "definitions": {"image": _entry(DatasetConfig), "text_embeds": _entry(TextCacheConfig)},
    }


# What the elements of a list may be, where that is more than texts; they are read by functions of their own (`Option.each`).
_ELEMENTS: dict[str, Schema] = {
    "crop_aspect_buckets": {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0},
            {
                "type": "object",
                "properties": {"aspect": {"type": "number", "exclusiveMinimum": 0}, "weight": {"type": "number", "exclusiveMinimum": 0}},
                "additionalProperties": False,
                "required": ["aspect"],
            },
        ]
    },
}
_TEXT_OR_TEXTS = ("caption_filter_list",)  # a path, or the lines themselves


def _entry(kind: type[Entry]) -> Schema:
    usable = [item for item in options_of(kind) if not item.not_yet]
    types = list(_types(usable))
    return {
        "type": "object",
        "properties": {name: _key(item, name) for item in usable for name in (item.name, *item.aliases)},
        "additionalProperties": False,
        "required": [item.name for item in usable if _is_required(item) and not item.of_type],
    } | ({"allOf": types} if types else {})


def _object(kind: type) -> Schema:
    """An object inside an entry."""
    usable = [item for item in options_of(kind) if not item.not_yet]
    return {
        "type": "object",
        "properties": {item.name: _key(item, item.name) for item in usable},
        "additionalProperties": False,
        "required": [item.name for item in usable if _is_required(item)],
    }


def _types(items: Iterable[Option]) -> Iterable[Schema]:
    """For each `type` that has keys of its own: they are required where they must be, and elsewhere are not there, or null."""
    own: dict[str, list[Option]] = {}
    default = ""
    for item in items:
        if item.name == "type":
            default = item.default
        elif item.of_type:
            own.setdefault(item.of_type, []).append(item)
    for kind, keys in own.items():
        yield {
            "if": _says("type", kind, unless_said=kind == default),
            "then": {"required": [item.name for item in keys if _is_required(item)]},
            "else": {"properties": {item.name: {"type": "null"} for item in keys}},
        }


def _says(key: str, value: Any, unless_said: bool = False) -> Schema:
    """Whether an entry has a key with this value; `unless_said` also where it lacks the key."""
    values = [value, None] if unless_said else [value]
    return {"properties": {key: {"enum": values}}} | ({} if unless_said else {"required": [key]})


def _is_required(item: Option) -> bool:
    return item.default_text == "required"


def _key(item: Option, name: str) -> Schema:
    """One key. Null is accepted everywhere, and means that nothing was said."""
    described: Schema = {"description": _description(item, name)}
    choices = [choice for choice in (*item.choices, *item.synonyms) if choice not in item.unavailable_choices]
    if choices:
        described["enum"] = [*choices, None]
    elif item.kind in (TableConfig, JsonCaptionConfig):
        described |= {"anyOf": [_object(item.kind), {"type": "null"}]}
    elif item.name == "resolution":
        several = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 1}
        described |= {"anyOf": [{"type": ["number", "null"]}, several]}
    elif item.kind is tuple:
        elements = {"type": "array", "items": _ELEMENTS.get(item.name, {"type": "string"})}
        alone = [{"type": "string"}] if item.one_or_many or item.name in _TEXT_OR_TEXTS else []
        described |= {"anyOf": [*alone, elements, {"type": "null"}]}
    else:
        described["type"] = [_TYPES[item.kind], "null"]
    bounds = {"minimum": item.at_least, "exclusiveMinimum": item.above, "maximum": item.at_most}
    described |= {word: bound for word, bound in bounds.items() if bound is not None}
    if item.default not in (None, "", ()) and not item.inherits:
        described["default"] = item.default
    if item.does_nothing:
        described["deprecated"] = True
        described["deprecationMessage"] = f"Does nothing: {item.does_nothing}."
    return described


def _description(item: Option, name: str) -> str:
    parts = [item.help if name == item.name else f"Another name of {item.name}. {item.help}"]
    if item.inherits:
        parts.append(f"Unless said: --{item.inherits}.")
    elif item.default_text and not _is_required(item):
        parts.append(f"Unless said: {item.default_text.replace('`', '')}.")
    return " ".join(parts)
