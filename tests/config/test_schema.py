"""The schema that editors complete the dataloader JSON by agrees with what the reader takes and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.config.datasets import DatasetConfig, TextCacheConfig
from helpers.config.declare import options_of
from helpers.config.json_file import read_json
from helpers.config.schema import dataloader_schema, schema_text

jsonschema = pytest.importorskip("jsonschema")

IMAGES: dict[str, Any] = {"id": "a", "instance_data_dir": "images"}
ROWS: dict[str, Any] = {"id": "a", "type": "huggingface", "path": "someone/pictures"}
TARS: dict[str, Any] = {"id": "a", "type": "webdataset", "urls": ["a.tar"]}
TEXTS: dict[str, Any] = {"id": "t", "dataset_type": "text_embeds"}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = dataloader_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_the_committed_schema_is_what_the_code_declares(repository: Path) -> None:
    committed = (repository / "documentation" / "dataloader.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run ./simpletuner document"


def test_every_key_that_can_be_used_is_completed_with_its_help_and_no_other() -> None:
    definitions = dataloader_schema()["definitions"]
    for name, kind in (("image", DatasetConfig), ("text_embeds", TextCacheConfig)):
        properties = definitions[name]["properties"]
        usable = [item for item in options_of(kind) if not item.not_yet]
        assert properties.keys() == {key for item in usable for key in (item.name, *item.aliases)}
        for item in usable:
            assert item.help in properties[item.name]["description"]
            assert not set(properties[item.name].get("enum", ())) & set(item.unavailable_choices)


def test_the_example_files_are_valid(repository: Path, validator: Any, tmp_path: Path) -> None:
    blocks = []
    for page in ("DATALOADER", "QUICKSTART"):
        text = (repository / "documentation" / f"{page}.md").read_text(encoding="utf-8")
        blocks += [block for block in re.findall(r"^```json5?\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if block.startswith("[")]
    assert len(blocks) >= 5
    examples = [read_json(path).value for path in (repository / "demo").rglob("*.json") if path.stem.endswith("dataloader")]
    assert len(examples) >= 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.json"
        path.write_text(block, encoding="utf-8")
        examples.append(read_json(path).value)
    for example in examples:
        validator.validate(example)


@pytest.mark.parametrize(
    "entries",
    [
        [IMAGES],
        [{**IMAGES, "type": "local", "resolution": 0.5, "resolution_type": "area", "crop": True, "repeats": 2}],
        [{**IMAGES, "crop_style": "centre", "caption_strategy": "filename"}],
        [{**IMAGES, "path": None, "caption_strategy": None, "type": None}],
        [{**IMAGES, "write_batch_size": 3, "disable": False}],
        [ROWS],
        [TARS],
        [{**TARS, "urls": "a.tar"}],
        [IMAGES, TEXTS],
        [IMAGES, {**TEXTS, "default": True, "cache_dir": "texts"}],
        [IMAGES, {"disabled": True, "whatever": 1}],
    ],
)
def test_what_the_reader_takes_is_valid(
    entries: Sequence[Any], folder: Path, write_data: Callable[..., None], read: Callable[..., Any], validator: Any
) -> None:
    (folder / "a.tar").touch()
    write_data(entries)
    read()
    validator.validate(entries)


@pytest.mark.parametrize(
    "entries",
    [
        {"id": "a"},
        [7],
        [{"id": "a"}],
        [{"instance_data_dir": "images"}],
        [{**IMAGES, "crop_stile": "random"}],
        [{**IMAGES, "crop_style": "middle"}],
        [{**IMAGES, "type": "aws"}],
        [{**IMAGES, "resolution": "64"}],
        [{**IMAGES, "resolution": 0}],
        [{**IMAGES, "repeats": 1.5}],
        [{**IMAGES, "repeats": -1}],
        [{**IMAGES, "crop": 1}],
        [{**IMAGES, "path": "x"}],
        [{**IMAGES, "cache_dir": "x"}],
        [{**ROWS, "instance_data_dir": "images"}],
        [{"id": "a", "type": "huggingface"}],
        [{**TARS, "urls": [7]}],
        [{"id": "a", "type": "webdataset"}],
        [IMAGES, {**TEXTS, "repeats": 1}],
        [{**IMAGES, "probability": -0.5}],
    ],
)
def test_what_is_not_valid_the_reader_refuses(
    entries: Any, write_data: Callable[..., None], refuse: Callable[..., str], validator: Any
) -> None:
    assert not validator.is_valid(entries)
    write_data(json.dumps(entries))
    assert refuse()
