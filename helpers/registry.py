"""A dictionary of choices whose modules are imported only when they are chosen. Each axis is one, with one line a choice."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

Choice = TypeVar("Choice")


class Registry(Mapping[str, Choice]):
    """name => the object at "package.module:Name", imported by `registry[name]`:

        OPTIMIZERS: Registry[type[Optimizer]] = Registry({"adamw": "torch.optim:AdamW"})
        optimizer = OPTIMIZERS["adamw"](parameters)

    Listing names imports nothing. mypy takes the type in the annotation for granted; it checks the objects in tests/test_conformance.py.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> Choice:
        module, _, attribute = self.places[name].partition(":")
        choice: Choice = getattr(importlib.import_module(module), attribute)
        return choice

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
