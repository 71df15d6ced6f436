"""Settings for the family that a base model turns out to be of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.facts import FamilyFacts
from helpers.errors import ConfigError

REFINER = FamilyFacts(
    "refiner", "the refiner", defaults={"refiner_training": True, "lora_rank": 4}, options=frozenset({"data_aesthetic_score"})
)
AXES = Axes({"sdxl": FamilyFacts("sdxl", "SDXL"), "refiner": REFINER})


def test_its_defaults_count_where_nobody_set_anything(read: Callable[..., Config]) -> None:
    config = read("--lora_rank=8").of_family(REFINER)
    assert config.family_name == "refiner"
    assert (config.objective.refiner_training, config.adapter.lora_rank) == (True, 8)
    assert (config.origins["refiner_training"], config.origins["lora_rank"]) == ("family refiner", "--lora_rank")


def test_what_it_refuses_is_refused(read: Callable[..., Config]) -> None:
    refuses = FamilyFacts(
        "refiner", "the refiner", judge=lambda settings: ["--lora_rank is too small."] if settings["lora_rank"] == 8 else []
    )
    with pytest.raises(ConfigError, match="too small"):
        read("--lora_rank=8").of_family(refuses)


def test_pictures_from_pictures_are_refused_where_the_family_makes_none(read: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="no pipeline of the refiner that begins with a picture; remove it"):
        read("--validation_using_datasets").of_family(REFINER)
    assert read("--validation_using_datasets").of_family(dataclasses.replace(REFINER, img2img=True)).validation.validation_using_datasets


def test_a_setting_that_only_another_family_knows_is_named(read: Callable[..., Config]) -> None:
    config = read("--data_aesthetic_score=5")
    assert list(config.of_other_families(AXES)) == ["--data_aesthetic_score does nothing for SDXL, only for the refiner."]
    assert list(config.of_family(REFINER).of_other_families(AXES)) == []
    assert list(read().of_other_families(AXES)) == []
