"""Options that families declare themselves, and settings for the family that a base model turns out to be of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.declare import option
from helpers.config.document import help_text, options_page
from helpers.config.facts import FamilyFacts
from helpers.config.saved import read_saved_config
from helpers.errors import ConfigError
from helpers.storage.atomic import write_json


@dataclass(frozen=True)
class RefinerOptions:
    """Refiner: what only this family has."""

    score: float = option(7.0, "Aesthetic score of the images.", at_most=10, env="SCORE_OF_IMAGES")
    whole_schedule: bool = option(False, "Train on all timesteps.", alias_of=("refiner_training", False))


BASE = FamilyFacts("base", "the base")
REFINER = FamilyFacts(
    "refiner",
    "the refiner",
    defaults={"refiner_training": True, "lora_rank": 4},
    section=RefinerOptions,
    model_types={"refiner-lora": {"model_family": "refiner", "model_type": "lora"}},
)
AXES = Axes({"base": BASE, "refiner": REFINER}, objectives=known_axes().objectives)
Read = Callable[..., Config]


def test_its_defaults_count_where_nobody_set_anything(read: Read) -> None:
    config = read("--lora_rank=8", facts=AXES).of_family(REFINER)
    assert config.family_name == "refiner"
    assert (config.objective.refiner_training, config.adapter.lora_rank) == (True, 8)
    assert (config.origins["refiner_training"], config.origins["lora_rank"]) == ("family refiner", "--lora_rank")


def test_what_it_refuses_is_refused(read: Read) -> None:
    refuses = dataclasses.replace(REFINER, judge=lambda settings: ["--lora_rank is too small."] if settings["lora_rank"] == 8 else [])
    with pytest.raises(ConfigError, match="too small"):
        read("--lora_rank=8", facts=AXES).of_family(refuses)


def test_pictures_from_pictures_are_refused_where_the_family_makes_none(read: Read) -> None:
    config = read("--validation_using_datasets", facts=Axes({"base": dataclasses.replace(BASE, img2img=True), "refiner": REFINER}))
    with pytest.raises(ConfigError, match="the refiner has no image-to-image pipeline"):
        config.of_family(REFINER)
    assert config.of_family(dataclasses.replace(REFINER, img2img=True)).validation.validation_using_datasets


def test_a_setting_that_only_another_family_reads_is_left_out_or_refused(read: Read) -> None:
    only = "is for the refiner, not for the base"
    assert read(SCORE="5", facts=AXES).unread(AXES) == [f"SCORE does nothing here: it {only}."]
    with pytest.raises(ConfigError, match=f"^--score {only}. Remove it.$"):
        read("--score=5", facts=AXES).unread(AXES)
    assert read("--score=5", facts=AXES).of_family(REFINER).unread(AXES) == []
    assert read(facts=AXES).unread(AXES) == []


def test_an_option_of_a_family_is_read_like_any_other(read: Read, refuse: Callable[..., str]) -> None:
    assert read("--score=5", facts=AXES).model.section(RefinerOptions).score == 5
    assert read(SCORE_OF_IMAGES="5", facts=AXES).model.section(RefinerOptions).score == 5
    assert read(facts=AXES).model.section(RefinerOptions) == RefinerOptions()
    assert read("--score=5", facts=AXES).values()["score"] == 5
    assert refuse("--score=11", facts=AXES) == "--score: 11.0 is above 10."
    assert refuse("--score=5", facts=Axes({"base": BASE})).startswith("--score is not an option")


def test_a_switch_of_a_family_is_stronger_than_the_default_it_replaces(read: Read, refuse: Callable[..., str]) -> None:
    """The family is known only when its base model is, long after the switch was read."""
    assert read("--whole_schedule", facts=AXES).of_family(REFINER).objective.refiner_training is False
    both = refuse("--whole_schedule", "--refiner_training", facts=AXES)
    assert both == "--whole_schedule means refiner_training=False, but --refiner_training says True; remove one."


def test_families_are_the_choices_of_the_model_family_and_the_first_is_its_default(read: Read, refuse: Callable[..., str]) -> None:
    assert read(facts=AXES).family_name == "base"
    assert read("--model_family=refiner", facts=AXES).family_name == "refiner"
    assert refuse("--model_family=sdx", facts=AXES) == "--model_family: 'sdx' is not one of base, refiner."
    named = read("--model_type=refiner-lora", facts=AXES)
    assert (named.family_name, named.model.model_type) == ("refiner", "lora")


def test_the_pages_show_what_families_declare() -> None:
    page = options_page(AXES)
    assert "## Refiner\n\nWhat only this family has.\n" in page
    assert "| `--score` | `SCORE_OF_IMAGES`, `SCORE` | `7` | Aesthetic score of the images. At most 10." in page
    assert "| `--lora_rank` | `LORA_RANK` | 16; 4 for refiner |" in page
    assert "base (the base), refiner (the refiner)." in page and "`refiner-lora`" in page
    assert "\n  --score X\n        Aesthetic score of the images. [7]" in help_text(AXES)


def test_settings_of_a_family_come_back_from_a_saved_run(read: Read, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", read("--score=5", facts=AXES).to_json())
    assert read_saved_config(tmp_path, AXES).model.section(RefinerOptions).score == 5
