"""What every key of the dataloader JSON that can be used changes. What falls back to an option is seen as that option is."""

from __future__ import annotations

from typing import Any

from helpers.config.datasets import DatasetConfig
from helpers.config.declare import options_of
from tests.config.effects.buckets import IMAGE_BUCKET_EFFECTS, TEXT_BUCKET_EFFECTS
from tests.config.effects.lab import ENTRY, SECOND, Effect, refusal
from tests.config.effects.options import OPTION_EFFECTS
from tests.config.effects.sights import buckets, losses, new_folders, of_samples, steps

BOTH = {"pictures", "second"}
SHAPES = {"96x64": 2, "64x96": 2, "64x64": 2}


def cropped(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**ENTRY, "crop": True, key: value}]


def beside_another(key: str, value: Any) -> list[dict[str, Any]]:
    return [dict(ENTRY), {**SECOND, key: value}]


def of_kind(key: str, value: str) -> list[dict[str, Any]]:
    """A second entry that is a data set or a place for embeddings."""
    second = dict(SECOND) if value == "image" else {"id": "second", "cache_dir": "unused"}
    return [dict(ENTRY), {**second, key: value}]


def with_two_text_caches(key: str, value: str) -> list[dict[str, Any]]:
    return [{**ENTRY, key: value}, *text_caches("left", default="one")]


def one_by_default(key: str, value: bool) -> list[dict[str, Any]]:
    return [dict(ENTRY), *text_caches("default", default="one" if value else "two")]


def wanted_by_its_id(key: str, value: str) -> list[dict[str, Any]]:
    return [{**ENTRY, "text_embeds": "wanted"}, {"dataset_type": "text_embeds", key: value}]


def perhaps_disabled(key: str, value: bool) -> list[dict[str, Any]]:
    return [dict(ENTRY), {"id": "text", "dataset_type": "text_embeds", "cache_dir": "kept", key: value}]


def one_text_cache(key: str, value: str) -> list[dict[str, Any]]:
    return [dict(ENTRY), {"id": "text", "dataset_type": "text_embeds", key: value}]


def text_caches(name: str, default: str) -> list[dict[str, Any]]:
    """Two entries `one` and `two`, each with a folder of its own."""
    return [{"id": id, "dataset_type": "text_embeds", "cache_dir": f"{name}_{id}", "default": id == default} for id in ("one", "two")]


def inherited() -> dict[str, Effect]:
    """Keys that fall back to an option have its effect, and its values; folders are named anew."""
    return {item.name: OPTION_EFFECTS[item.inherits] for item in options_of(DatasetConfig) if item.inherits}


DATASET_EFFECTS: dict[str, Effect] = {
    **inherited(),
    **IMAGE_BUCKET_EFFECTS,
    "id": Effect(of_samples("dataset"), {"one": {"one"}, "two": {"two"}}),
    "dataset_type": Effect(of_samples("dataset"), {"image": BOTH, "text_embeds": {"pictures"}}, ("--max_train_steps=6",), of_kind),
    "disabled": Effect(of_samples("dataset"), {"false": BOTH, "true": {"pictures"}}, ("--max_train_steps=6",), beside_another),
    "instance_data_dir": Effect(losses, ["images", "other_images"]),
    "cache_dir_vae": Effect(new_folders, {"latents_3": {"latents_3"}, "latents_4": {"latents_4"}}),
    "text_embeds": Effect(new_folders, {"one": {"left_one"}, "two": {"left_two"}}, (), with_two_text_caches),
    "crop": Effect(buckets, {"false": SHAPES, "true": {"64x64": 6}}),
    "crop_style": Effect(of_samples("crop"), ["random", "corner", "center"], (), cropped),
    "crop_aspect": Effect(buckets, {"square": {"64x64": 6}, "preserve": SHAPES}, (), cropped),
    "flip": Effect(losses, ["false", "true"]),
    "repeats": Effect(steps, {"0": 3, "1": 6}, ("--max_train_steps=0", "--num_train_epochs=1")),
    "loss_weight": Effect(losses, ["1", "2"]),
}

TEXT_CACHE_EFFECTS: dict[str, Effect] = {
    **TEXT_BUCKET_EFFECTS,
    "id": Effect(refusal, ["wanted", "another"], (), wanted_by_its_id),
    "dataset_type": DATASET_EFFECTS["dataset_type"],
    "disabled": Effect(new_folders, {"false": {"kept"}, "true": set()}, (), perhaps_disabled),
    "cache_dir": Effect(new_folders, {"texts_3": {"texts_3"}, "texts_4": {"texts_4"}}, (), one_text_cache),
    "default": Effect(new_folders, {"true": {"default_one"}, "false": {"default_two"}}, (), one_by_default),
}
