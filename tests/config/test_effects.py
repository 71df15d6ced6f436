"""Each option and each key of the dataloader JSON that can be used has an effect; it is refused otherwise, or says that it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from helpers.config.config import Config
from helpers.config.datasets import DatasetConfig, TextCacheConfig
from helpers.config.declare import Option, options_of
from helpers.config.options import OPTIONS
from tests.config.effects.keys import DATASET_EFFECTS, TEXT_CACHE_EFFECTS
from tests.config.effects.lab import ENTRY, Effect, Lab, build_lab
from tests.config.effects.options import OPTION_EFFECTS
from tests.config.effects.sights import exported_scheduler, losses
from tests.config.test_every_option import values_to_try

KEYS: dict[type, Mapping[str, Effect]] = {DatasetConfig: DATASET_EFFECTS, TextCacheConfig: TEXT_CACHE_EFFECTS}


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return build_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab(built_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(built_lab.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(built_lab.folder / "hub"))
    return built_lab


@pytest.mark.parametrize("name", OPTION_EFFECTS)
def test_an_option_has_its_effect(name: str, lab: Lab) -> None:
    OPTION_EFFECTS[name].check(lab, lambda value: f"--{name}={value}")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, effects in KEYS.items() for name in effects])
def test_a_key_has_its_effect(kind: type, name: str, lab: Lab) -> None:
    [item] = [item for item in options_of(kind) if item.name == name]
    effect = KEYS[kind][name]
    effect.check(lab, lambda value: lab.data(effect.entries(name, item.parse(value))))


def test_the_same_settings_give_the_same_losses(lab: Lab) -> None:
    """Or losses would differ under any two values of an option."""
    assert lab.run_again((), lab.new_folder()).rows("samples.jsonl") == lab.run().rows("samples.jsonl")
