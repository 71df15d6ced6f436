"""What every key of the dataloader JSON that can be used changes. What falls back to an option is seen as that option is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers.config.datasets import DatasetConfig, JsonCaptionConfig, TableConfig
from helpers.config.declare import options_of
from helpers.config.options.data import TABLES
from tests.config.effects.buckets import IMAGE_BUCKET_EFFECTS, TEXT_BUCKET_EFFECTS
from tests.config.effects.lab import ENTRY, SECOND, Effect, conditioned, cropped, refusal
from tests.config.effects.options import OPTION_EFFECTS
from tests.config.effects.probes import (
    begun,
    buckets,
    images_used,
    kinds_of_pictures,
    losses,
    new_folders,
    of_samples,
    same_cuts_in_two_epochs,
    steps,
)

ROWS: Mapping[str, Any] = {"id": "pictures", "type": "huggingface", "path": "rows", "split": "images"}
TARS: Mapping[str, Any] = {"id": "pictures", "type": "webdataset", "urls": "images.tar"}
BOTH = {"pictures", "second"}
CAPTIONS = {f"caption number {index}" for index in range(6)}
FILES = {
    "local": {f"picture_{index}.png" for index in range(6)},
    "huggingface": {f"{index:07}.jpg" for index in range(6)},
    "webdataset": {f"images/picture_{index}.png" for index in range(6)},
}
CONTROLNET = ("--model_type=full", "--controlnet")
SIDES = ("left", "right")
SHADES = ("dark", "light")  # noise that serves as conditioning images, and as masks
SHAPES = {"96x64": 2, "64x96": 2, "64x64": 2}


def cropped_to_wide(key: str, value: Any) -> list[dict[str, Any]]:
    """Where shapes are drawn there is one to draw."""
    return [{**ENTRY, "crop": True, "crop_aspect_buckets": [1.5], key: value}]


def cropped_to_one_of(key: str, value: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{**ENTRY, "crop": True, "crop_aspect": "random", key: [float(aspect) for aspect in value]}]


def beside_another(key: str, value: Any) -> list[dict[str, Any]]:
    return [dict(ENTRY), {**SECOND, key: value}]


def mixed_in_thinly(key: str, value: Any) -> list[dict[str, Any]]:
    """Two sets of three micro-batches, the second drawn a third as often as the first."""
    return [{**ENTRY, "probability": 3}, {**SECOND, "probability": 1, key: value}]


def of_kind(key: str, value: str) -> list[dict[str, Any]]:
    """A second entry that is a dataset or a place for embeddings."""
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


def of_type(key: str, value: str) -> list[dict[str, Any]]:
    return [{**{"local": ENTRY, "huggingface": ROWS, "webdataset": TARS}[value], key: value}]


def of_rows(key: str, value: str) -> list[dict[str, Any]]:
    return [{**ROWS, key: value}]


def of_tars(key: str, value: str) -> list[dict[str, Any]]:
    return [{**TARS, key: value}]


def of_tags(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**ENTRY, "instance_data_dir": "tagged", "caption_strategy": "textfile", "shuffle_tags": True, key: value}]


def of_a_table(key: str, value: TableConfig) -> list[dict[str, Any]]:
    return [{**ENTRY, "caption_strategy": key, key: {"path": f"../tables/{value.path}"}}]


def sized_by_a_table(key: str, value: str) -> list[dict[str, Any]]:
    return [{**ENTRY, key: value, **{kind: {"path": f"../tables/left.{kind}"} for kind in TABLES}}]


def with_a_filter(key: str, value: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{**ENTRY, "caption_strategy": "textfile"}, {"id": "text", "dataset_type": "text_embeds", key: value}]


def followed(key: str, value: str) -> list[dict[str, Any]]:
    return conditioned(**{key: value})


def resized(key: str, value: str) -> list[dict[str, Any]]:
    [images, dark, light] = conditioned()
    return [images, {**dark, key: value}, light]


def masked(key: str, value: Any) -> list[dict[str, Any]]:
    sets = [{"id": name, "dataset_type": "mask", "instance_data_dir": name} for name in SHADES]
    return [{**ENTRY, "mask_data": "light", key: value}, *sets]


def with_sidecars(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**ENTRY, "instance_data_dir": "sidecars", "caption_strategy": "textfile", key: value}]


def of_json_files(key: str, value: JsonCaptionConfig) -> list[dict[str, Any]]:
    return [{**ENTRY, "instance_data_dir": "sidecars", "caption_strategy": "json", key: {"caption_key": value.caption_key}}]


def named_as_kohya_does(key: str, value: str) -> list[dict[str, Any]]:
    return [{**ENTRY, "instance_data_dir": "kohya", key: value}]


def captions(start: str) -> set[str]:
    return {f"{start} {index}" for index in range(6)}


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
    "minimum_aspect": Effect(images_used, {"0.5": 6, "1": 4}),
    "maximum_aspect": Effect(images_used, {"2": 6, "1": 4}),
    "crop": Effect(buckets, {"false": SHAPES, "true": {"64x64": 6}}),
    "crop_style": Effect(of_samples("crop"), ["random", "corner", "center"], (), cropped),
    "crop_aspect": Effect(buckets, {"square": {"64x64": 6}, "preserve": SHAPES, "random": {"96x64": 6}}, (), cropped_to_wide),
    "crop_aspect_buckets": Effect(buckets, {"1": {"64x64": 6}, "1.5": {"96x64": 6}}, (), cropped_to_one_of),
    "vae_cache_clear_each_epoch": Effect(same_cuts_in_two_epochs, {"false": True, "true": False}, ("--max_train_steps=6",), cropped),
    "conditioning_data": Effect(losses, ["dark", "light"], CONTROLNET, followed),
    "mask_data": Effect(losses, ["dark", "light", "alpha"], (), masked),
    "mask_outside_weight": Effect(losses, ["0", "0.5"], (), masked),
    "resize_filter": Effect(losses, ["lanczos", "nearest"], CONTROLNET, resized),
    "flip": Effect(losses, ["false", "true"]),
    "probability": Effect(of_samples("dataset"), {"0": {"pictures"}, "1e9": {"second"}}, (), beside_another),
    "ignore_epochs": Effect(steps, {"false": 6, "true": 4}, ("--max_train_steps=0", "--num_train_epochs=1"), mixed_in_thinly),
    "is_regularisation_data": Effect(refusal, ["false", "true"]),
    "multiple_captions": Effect(of_samples("caption"), ["false", "true"], (), of_tags),
    "shuffle_tags": Effect(of_samples("caption"), ["false", "true"], (), of_tags),
    "keep_tags": Effect(of_samples("caption"), ["0", "2"], (), of_tags),
    "tag_separator": Effect(of_samples("caption"), [",", ";"], (), of_tags),
    "caption_extensions": Effect(of_samples("caption"), {".txt": captions("beside"), ".caption": captions("written")}, (), with_sidecars),
    "caption_folder": Effect(of_samples("caption"), {"apart": captions("apart"), "sidecars": captions("beside")}, (), with_sidecars),
    "json": Effect(of_samples("caption"), {"caption": captions("first"), "other": captions("second")}, (), of_json_files),
    "layout": Effect(
        of_samples("dataset"),
        {"plain": {"pictures"}, "kohya": {"pictures/1_left", "pictures/2_right"}},
        ("--max_train_steps=6",),
        named_as_kohya_does,
    ),
    "metadata_backend": Effect(images_used, {"json": 6, "parquet": 5}, (), sized_by_a_table),
    **{kind: Effect(of_samples("caption"), {f"{side}.{kind}": captions(side) for side in SIDES}, (), of_a_table) for kind in TABLES},
    "disable_validation": Effect(
        kinds_of_pictures,
        {"false": {"validation", *begun(8)}, "true": {"validation", *begun(4)}},
        ("--validation_using_datasets",),
        lambda key, value: [{**ENTRY, key: value}, SECOND],
    ),
    "repeats": Effect(steps, {"0": 3, "1": 6}, ("--max_train_steps=0", "--num_train_epochs=1")),
    "loss_weight": Effect(losses, ["1", "2"]),
    "type": Effect(of_samples("key"), FILES, (), of_type),
    "path": Effect(losses, ["rows", "other_rows"], (), of_rows),
    "split": Effect(losses, ["images", "other_images"], (), of_rows),
    "image_column": Effect(losses, ["image", "turned"], (), of_rows),
    "caption_column": Effect(of_samples("caption"), {"text": CAPTIONS, "loud": {c.upper() for c in CAPTIONS}}, (), of_rows),
    "urls": Effect(losses, ["images.tar", "other_images.tar"], (), of_tars),
}

TEXT_CACHE_EFFECTS: dict[str, Effect] = {
    **TEXT_BUCKET_EFFECTS,
    "id": Effect(refusal, ["wanted", "another"], (), wanted_by_its_id),
    "type": Effect(refusal, ["local", "webdataset"], (), one_text_cache),
    "dataset_type": DATASET_EFFECTS["dataset_type"],
    "disabled": Effect(new_folders, {"false": {"kept"}, "true": set()}, (), perhaps_disabled),
    "cache_dir": Effect(new_folders, {"texts_3": {"texts_3"}, "texts_4": {"texts_4"}}, (), one_text_cache),
    "caption_filter_list": Effect(
        of_samples("caption"), {"caption ": captions("number"), "s/c.*r/dog/": captions("dog")}, (), with_a_filter
    ),
    "default": Effect(new_folders, {"true": {"default_one"}, "false": {"default_two"}}, (), one_by_default),
}
