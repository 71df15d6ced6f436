"""Prompts and sizes of validation images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.config.options import ValidationOptions
from helpers.data.base.draws import StepDraws
from helpers.data.base.sample import Geometry, Sample, Size
from helpers.data.batches import Batch
from helpers.errors import ConfigError
from helpers.training.prompt_library import PROMPTS
from helpers.training.validation import Prompt, first_images, parse_sizes, read_prompts

TRAINED = Size(1216, 832)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, [TRAINED]),
        ("1024", [Size(1024, 1024)]),
        ("1.0", [Size(1000, 1000)]),
        ("0.5", [Size(704, 704)]),
        ("1024x768", [Size(1024, 768)]),
        ("1023x770, 512", [Size(1024, 768), Size(512, 512)]),
    ],
)
def test_sizes_are_pixels_or_with_a_decimal_point_megapixels(text: str | None, sizes: list[Size]) -> None:
    assert parse_sizes(text, TRAINED, 8) == sizes


@pytest.mark.parametrize("text", ["big", "1024x", "1", "0.00001", "4x1024"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--validation_resolution"):
        parse_sizes(text, TRAINED, 8)


def test_prompts_come_in_the_order_of_their_images(tmp_path: Path) -> None:
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"cat": "a cat", "quoted": 'say "$5"'}), encoding="utf-8-sig")
    options = dataclasses.replace(ValidationOptions(), validation_prompt="a dog", user_prompt_library=library)
    assert read_prompts(options) == [
        Prompt("unconditional", None),
        Prompt("cat", "a cat"),
        Prompt("quoted", 'say "$5"'),
        Prompt("validation", "a dog"),
    ]
    without = dataclasses.replace(options, validation_disable_unconditional=True, user_prompt_library=None, validation_prompt=None)
    assert read_prompts(without) == []


def test_the_users_prompts_come_after_the_built_in_ones_and_replace_those_of_their_name(tmp_path: Path) -> None:
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"owl": "a painted owl", "own": "a prompt of my own"}))
    options = dataclasses.replace(ValidationOptions(), validation_prompt_library=True, user_prompt_library=library)
    prompts = read_prompts(options)
    assert len(prompts) == 1 + len(PROMPTS) + 1 and prompts[-1] == Prompt("own", "a prompt of my own")
    assert Prompt("owl", "a painted owl") in prompts and Prompt("owl", PROMPTS["owl"]) not in prompts


def test_every_built_in_prompt_has_a_name_for_files_and_is_read_whole() -> None:
    assert len(PROMPTS) == 32 and all(name.isidentifier() for name in PROMPTS)
    assert all(len(text.split()) < 25 for text in PROMPTS.values())  # of 77 tokens


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": 1}', "not json", '{"../a": "b"}'])
def test_a_broken_prompt_library_is_named(content: str, tmp_path: Path) -> None:
    library = tmp_path / "prompts.json"
    library.write_text(content)
    with pytest.raises(ConfigError, match=r"prompts\.json"):
        read_prompts(dataclasses.replace(ValidationOptions(), user_prompt_library=library))


def batch(*keys: str) -> Batch:
    size = Size(64, 64)
    return Batch(
        latents=torch.stack([torch.full((4, 8, 8), float(key)) for key in keys]),
        text={"states": torch.stack([torch.full((3,), float(key)) for key in keys])},
        captions=tuple(f"caption {key}" for key in keys),
        samples=tuple(Sample("pictures", key, size, (f"caption {key}",)) for key in keys),
        geometry=(Geometry(size, size, 0, 0, size),) * len(keys),
        loss_weight=torch.ones(len(keys)),
        draws=StepDraws(1, 0, tuple(range(len(keys))), len(keys)),
        epoch=0,
    )


def test_dataset_images_are_the_first_of_the_data_each_once() -> None:
    found = first_images([[batch("1", "2"), batch("2")], [batch("3", "1", "4")]], {"pictures": 3})
    assert [(prompt.name, prompt.text) for prompt in found] == [
        ("picture_1", "caption 1"),
        ("picture_2", "caption 2"),
        ("picture_3", "caption 3"),
    ]
    assert [start.latents[0, 0, 0].item() for start in found.values()] == [1, 2, 3]
    assert [start.text["states"][0].item() for start in found.values()] == [1, 2, 3]


def of_sets(*datasets: str) -> Batch:
    """One image of each, whose key is its place."""
    keys = [str(number) for number in range(len(datasets))]
    plain = batch(*keys)
    samples = tuple(dataclasses.replace(sample, dataset=name) for sample, name in zip(plain.samples, datasets, strict=True))
    return dataclasses.replace(plain, samples=samples)


def test_each_dataset_gives_as_many_images_as_asked_and_others_none() -> None:
    found = first_images([[of_sets("a", "b", "c", "a", "a", "b")]], {"a": 2, "b": 1})
    assert [prompt.text for prompt in found] == ["caption 0", "caption 1", "caption 3"]


def test_no_more_steps_are_read_than_needed_and_placeholders_do_not_count() -> None:
    made = []

    def steps() -> Iterator[list[Batch]]:
        for number in range(5):
            made.append(number)
            yield [dataclasses.replace(batch(str(number)), stands_in=number == 0)]

    assert [prompt.text for prompt in first_images(steps(), {"pictures": 2})] == ["caption 1", "caption 2"]
    assert made == [0, 1, 2]
    assert first_images(steps(), {}) == {} and made == [0, 1, 2]
