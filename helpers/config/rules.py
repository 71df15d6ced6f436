"""Pairs of settings that cannot be meant together, whatever is trained."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.config.aspects import LARGEST_MEGAPIXELS
from helpers.config.buckets import caches_inside_images
from helpers.config.datasets import DataConfig
from helpers.config.libraries import lacking, nothing_is_installed
from helpers.config.model_names import model_problem
from helpers.config.optimizer_rules import missing_library, optimizer_problems
from helpers.config.settle import chosen_method
from helpers.config.sizes import ALIGNMENTS, IN_THE_UNIT, size_problems
from helpers.config.sources import Rank, Setting, said_by
from helpers.config.tracker_login import missing_login

SMALLEST_PIXELS = 16  # nobody trains below it: the number is an area in megapixels
VALIDATION_FOLDER = "validation_images"  # in OUTPUT_DIR; those of an earlier run are tempting as a dataset
_SIZE = re.compile(r"[1-9]\d*x[1-9]\d*|[1-9]\d*|\d*\.\d+|\d+\.", re.IGNORECASE)
TRACKERS = {  # choice of --report_to -> module, package
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", "comet-ml"),
}

MODELS = (  # options that name a model
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_t5_model_name_or_path",
    "controlnet_model_name_or_path",
    "single_file_config",
)
BESIDE_A_FROZEN_BASE = ("lora", "lycoris")  # methods that only ask the base model's weights

Chosen = Mapping[str, Setting]


def impossible(chosen: Chosen, data: DataConfig, environ: Mapping[str, str]) -> Iterator[str]:
    """One sentence for every combination that cannot be used, naming the options and the remedy."""
    yield from _required(chosen)
    yield from _sizes(chosen, data)
    yield from _schedule(chosen)
    yield from optimizer_problems(chosen)
    yield from _captions(data)
    yield from _files(chosen)
    yield from _folders(chosen, data)
    yield from caches_inside_images(data)
    yield from _validation(chosen, data)
    yield from _reporting(chosen)
    yield from _launch(chosen)
    yield from _memory(chosen)
    yield from _libraries(chosen, environ)


def _required(chosen: Chosen) -> Iterator[str]:
    if not chosen["pretrained_model_name_or_path"].value:
        yield "The base model is missing: set MODEL_NAME or --pretrained_model_name_or_path, or try --demo."
    if chosen["data_backend_config"].value is None:
        yield "The data is missing: set DATALOADER_CONFIG or --data_backend_config, or try --demo."


def _sizes(chosen: Chosen, data: DataConfig) -> Iterator[str]:
    unit = chosen["resolution_type"].value
    grid = chosen["aspect_bucket_alignment"].value
    if grid is not None and grid not in ALIGNMENTS:
        yield f"{said_by(chosen, 'aspect_bucket_alignment')}: {grid} is neither 8 nor 64; use one of them."
    for name in ("resolution", *IN_THE_UNIT):
        if chosen[name].rank > Rank.DECLARED or _falls_back(name, chosen, data):
            yield from _size(said_by(chosen, name), chosen[name].value, unit, "--resolution_type=")
    for dataset in data.datasets:
        yield from size_problems(dataset)
        for name in ("resolution", *IN_THE_UNIT):
            value = getattr(dataset, name)
            if value != chosen[name].value or dataset.resolution_type != unit:
                yield from _size(f"dataset {dataset.id!r}, {name}", value, dataset.resolution_type, "resolution_type ")


def _falls_back(name: str, chosen: Chosen, data: DataConfig) -> bool:
    """Whether a dataset takes a size from the options, or might: where none was read, nothing is known of them."""
    default = (chosen[name].value, chosen["resolution_type"].value)
    return not data.datasets or any((getattr(dataset, name), dataset.resolution_type) == default for dataset in data.datasets)


def _size(what: str, value: float | None, unit: str, remedy: str) -> Iterator[str]:
    if value is None:
        return
    if unit == "area" and value > LARGEST_MEGAPIXELS:  # the number is a length in pixels
        yield f"{what}: {value:g} megapixels; did you mean {remedy}pixel?"
    if unit == "pixel" and 0 < value < SMALLEST_PIXELS:
        yield f"{what}: {value:g} pixels; did you mean {remedy}area?"


def _schedule(chosen: Chosen) -> Iterator[str]:
    kind, peak, end = (chosen[name].value for name in ("lr_scheduler", "learning_rate", "lr_end"))
    warmup, steps = chosen["lr_warmup_steps"].value, chosen["max_train_steps"].value
    if kind == "sine" and warmup == 0:
        said = said_by(chosen, "lr_warmup_steps")
        yield f"{said} is 0, but --lr_scheduler=sine needs --lr_warmup_steps above 0: it is half the length of a wave."
    if kind == "polynomial" and end >= peak:
        yield f"--lr_end {end:g} must be below --learning_rate {peak:g} for --lr_scheduler=polynomial."
    elif kind in ("linear", "cosine", "cosine_with_restarts", "sine") and end > peak:
        yield f"--lr_end {end:g} is above --learning_rate {peak:g}; lower it."
    if kind in ("linear", "cosine", "cosine_with_restarts", "polynomial") and steps and warmup is not None and warmup >= steps:
        yield f"--lr_warmup_steps {warmup} leaves no step of --max_train_steps {steps} for --lr_scheduler={kind}; lower it."


def _captions(data: DataConfig) -> Iterator[str]:
    for dataset in data.datasets:
        uses = {
            "caption_strategy=instanceprompt": dataset.caption_strategy == "instanceprompt",
            "only_instance_prompt": dataset.only_instance_prompt,
            "prepend_instance_prompt": dataset.prepend_instance_prompt,
        }
        for setting in (name for name, used in uses.items() if used and not dataset.instance_prompt):
            yield f"dataset {dataset.id!r}: {setting} needs an instance_prompt."
        if dataset.only_instance_prompt and dataset.prepend_instance_prompt:
            yield f"dataset {dataset.id!r}: only_instance_prompt and prepend_instance_prompt exclude each other; remove one."
        if dataset.multiple_captions and dataset.caption_strategy in ("filename", "instanceprompt"):
            yield f"dataset {dataset.id!r}: multiple_captions needs caption_strategy textfile, parquet, jsonl or csv."
        if dataset.shuffle_tags and not dataset.tag_separator:
            yield f"dataset {dataset.id!r}: tag_separator is empty; name what stands between tags, or a space."
        if dataset.keep_tags and not dataset.shuffle_tags:
            yield f"dataset {dataset.id!r}: keep_tags needs shuffle_tags: true."


def _files(chosen: Chosen) -> Iterator[str]:
    library = chosen["user_prompt_library"].value
    if library is not None and not os.path.isfile(library):
        yield f"--user_prompt_library: there is no file {library}; check the path."
    for name in MODELS:
        model = chosen[name].value
        if model and (problem := model_problem(model, may_be_file=name == "pretrained_model_name_or_path")):
            yield f"{said_by(chosen, name)}: {problem}."
    output = chosen["output_dir"].value
    if os.path.exists(output) and not os.path.isdir(output):
        yield f"{said_by(chosen, 'output_dir')}: {output} is a file; name a folder."


def _folders(chosen: Chosen, data: DataConfig) -> Iterator[str]:
    """Nothing is ever written into a folder of images."""
    output = chosen["output_dir"].value
    written: list[tuple[str, Any]] = [(said_by(chosen, "output_dir"), folder) for folder in (output, output / VALIDATION_FOLDER)]
    written += [(f"--{name}", chosen[name].value) for name in ("cache_dir", "cache_dir_vae", "cache_dir_text")]
    written += [
        (f"dataset {dataset.id!r}, cache_dir_vae", dataset.cache_dir_vae) for dataset in data.datasets if not dataset.latents_prefix
    ]
    written += [
        (f"{entry.id!r}, cache_local_dir", entry.cache_local_dir) for entry in (*data.datasets, *data.text_caches) if entry.cache_local_dir
    ]
    written += [(f"text_embeds {text.id!r}, cache_dir", text.cache_dir) for text in data.text_caches]
    refused: list[Path] = []  # what is inside one of them has the same cause
    for what, folder in written:
        for dataset in (*data.datasets, *data.companions):
            if dataset.folder is None or any(folder.resolve().is_relative_to(outer) for outer in refused):
                continue
            images = dataset.folder.resolve()
            if folder.resolve().is_relative_to(images):
                refused.append(folder.resolve())
                yield f"{what}: {folder} is inside the images of dataset {dataset.id!r} ({images}), which are never written to."


def _validation(chosen: Chosen, data: DataConfig) -> Iterator[str]:
    sizes = chosen["validation_resolution"]
    for part in (sizes.value or "").split(","):
        if part.strip() and not _SIZE.fullmatch(part.strip()):
            yield f"{sizes.origin}: {part.strip()!r} is not a size; write 1024x768 or 1024 (pixels), or 1.0 (megapixels)."
    chosen_set, shown = chosen["eval_dataset_id"], [dataset.id for dataset in data.datasets if not dataset.disable_validation]
    if data.datasets and chosen_set.value is not None and chosen_set.value not in shown:
        known = f"it can be {', '.join(shown)}" if shown else "all of them have disable_validation"
        yield f"{chosen_set.origin}: no dataset that validation may use has the id {chosen_set.value!r}; {known}."
    elif data.datasets and chosen["validation_using_datasets"].value and not shown:
        yield f"{chosen['validation_using_datasets'].origin}: every dataset has disable_validation; remove it from one."


def _reporting(chosen: Chosen) -> Iterator[str]:
    trackers = chosen["report_to"].value
    if "none" in trackers and len(trackers) > 1:
        yield "--report_to: none stands alone; remove it or the others."


def _launch(chosen: Chosen) -> Iterator[str]:
    try:
        shlex.split(chosen["accelerate_extra_args"].value)
    except ValueError as error:
        yield f"{chosen['accelerate_extra_args'].origin}: cannot be split into words: {error}."
    if chosen["training_num_machines"].value > chosen["training_num_processes"].value:
        yield "training_num_processes counts the processes of all machines; it cannot be below training_num_machines."


def _memory(chosen: Chosen) -> Iterator[str]:
    kind = chosen["base_quantization"]
    if kind.value != "none" and chosen_method(dict(chosen)) not in BESIDE_A_FROZEN_BASE:
        yield (f"{kind.origin}: {kind.value} quantizes a frozen base model; use --model_type=lora, or --base_quantization=none.")
    yield from _base_lora(chosen)
    kernel, sliced = chosen["attention"], chosen["unet_attention_slice"]
    if kernel.value != "auto" and sliced.value:
        yield f"{sliced.origin}: slices are computed without the kernels that {kernel.origin} chooses among; leave one of them out."


def _base_lora(chosen: Chosen) -> Iterator[str]:
    lora = chosen["base_lora"]
    if lora.value is None:
        return
    if chosen_method(dict(chosen)) not in BESIDE_A_FROZEN_BASE:
        yield (
            f"{lora.origin}: it is added to a frozen base model, beside which an adapter is trained, and trained weights would keep it; "
            "use --model_type=lora, or leave it out."
        )
    elif not os.path.isfile(lora.value):
        yield f"{lora.origin}: there is no file {lora.value}; check the path."
    elif chosen["use_dora"].value:
        yield f"{lora.origin}: --use_dora trains the magnitudes of weights that would contain it; leave one of them out."
    elif chosen["lora_init_type"].value == "loftq":
        yield f"{lora.origin}: --lora_init_type=loftq starts from the weights without it; leave one of them out."


def _libraries(chosen: Chosen, environ: Mapping[str, str]) -> Iterator[str]:
    """What is asked for and not installed, or cannot log in, said before hours of caching rather than after."""
    for name in chosen["report_to"].value:
        if name in TRACKERS and (lacks := lacking(name, *TRACKERS[name])):
            yield f"{said_by(chosen, 'report_to')}: {lacks}, or choose another."
        elif not (nothing_is_installed() or chosen["dataset_report"].value) and (lacks := missing_login(name, environ)):
            yield f"{said_by(chosen, 'report_to')}: {lacks}"
    if chosen["base_quantization"].value == "nf4" and (lacks := lacking("nf4", "bitsandbytes", "bitsandbytes")):
        yield f"{said_by(chosen, 'base_quantization')}: {lacks}, or choose int8."
    if chosen_method(dict(chosen)) == "lycoris" and (lacks := lacking(chosen["lora_algorithm"].value, "lycoris", "lycoris-lora")):
        yield f"{said_by(chosen, 'lora_algorithm')}: {lacks}, or choose lora."
    yield from missing_library(chosen)
