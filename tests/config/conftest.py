from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.choices import known_axes
from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.errors import ConfigError

Read = Callable[..., Config]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that the user calls from, with a folder `images` and a dataloader file `data.json`."""
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "pictures", "instance_data_dir": "images"}]))
    conditions = {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": "images"}
    images = {"id": "pictures", "instance_data_dir": "images", "conditioning_data": "edges"}
    (tmp_path / "conditioned.json").write_text(json.dumps([images, conditions]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(folder: Path) -> Read:
    """`read(*flags, VARIABLE=value)`: the Config of a run that has a model and data."""

    def read_with(*flags: str, facts: Axes | None = None, **variables: str) -> Config:
        required = ["--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json"]
        return read_config([*required, *flags], variables, facts or known_axes())

    return read_with


@pytest.fixture
def refuse(read: Read) -> Callable[..., str]:
    """`refuse(*flags, VARIABLE=value)`: what the run is refused with, a line each."""

    def refuse_with(*flags: str, **arguments: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            read(*flags, **arguments)
        return "\n".join(caught.value.problems)

    return refuse_with


@pytest.fixture
def write_data(folder: Path) -> Callable[[Sequence[Mapping[str, Any]] | str], None]:
    """Replace `data.json` by these entries, or by this text."""

    def write(content: Sequence[Mapping[str, Any]] | str) -> None:
        (folder / "data.json").write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")

    return write
