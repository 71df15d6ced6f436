"""JSON from elsewhere that is nested deeply, or holds a number of thousands of digits: a sentence wherever it is read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.caption_filters import read_filter_file
from helpers.config.lora_file import read_lora_file
from helpers.data.cache.shards import DamagedShardError, read_header
from helpers.data.catalogue.tables import _parsed
from helpers.errors import ConfigError, DataError, ModelError
from helpers.families.loading.folder import read_json
from helpers.families.loading.integrity import problem_with
from helpers.storage.atomic import verify_manifest
from helpers.storage.webdataset import _caption_in
from helpers.training.validation import LONGEST_NAME, _library

BOMBS = {
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"a": ' + b"1" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
}


def as_header(bomb: bytes) -> bytes:
    """As the header of a safetensors file."""
    return struct.pack("<Q", len(bomb)) + bomb


def problem(path: Path) -> None:
    if found := problem_with(path):
        raise ModelError(found)


def damage(path: Path) -> None:
    if found := verify_manifest(path.parent):
        raise DataError(found[0])


# name of the file => what reads it, how the bytes stand in it, and what it raises
READERS: dict[str, tuple[Callable[[Path], object], Callable[[bytes], bytes], type[Exception]]] = {
    "prompts.json": (_library, bytes, ConfigError),
    "filters.json": (read_filter_file, bytes, ValueError),
    "lora.safetensors": (read_lora_file, as_header, ValueError),
    "model.safetensors": (problem, as_header, ModelError),
    "config.json": (read_json, bytes, ModelError),
    "shard.safetensors": (read_header, as_header, DamagedShardError),
    "manifest.json": (damage, bytes, DataError),
    "table.jsonl": (lambda path: _parsed(path.read_bytes(), "line 3"), bytes, DataError),
    "sample.json": (lambda path: _caption_in(path.read_bytes(), "sample"), bytes, FileNotFoundError),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", READERS)
def test_it_is_named_in_a_sentence(name: str, bomb: str, tmp_path: Path) -> None:
    read, written, error = READERS[name]
    (tmp_path / name).write_bytes(written(BOMBS[bomb]))
    with pytest.raises(error) as raised:
        read(tmp_path / name)
    assert not isinstance(raised.value, RecursionError) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["n" * (LONGEST_NAME + 1), "nul\\u0000", "line\\n", "\\ud800"])
def test_names_of_prompts_that_are_no_file_names_are_refused_before_anything_is_encoded(name: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(f'{{"{name}": "a cat"}}')
    with pytest.raises(ConfigError, match="--user_prompt_library: .* (cannot be part of a file name|is longer than 180 bytes)"):
        _library(tmp_path / "prompts.json")
