"""The settings of datasets for scanning and cropping, and the plan on disk that all processes share."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig, TableConfig, table_format
from helpers.data.base.draws import uniform
from helpers.data.base.sample import Size
from helpers.data.catalogue.captions import CaptionRule, CaptionStrategy, TagShuffle
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.faces import face_middles
from helpers.data.catalogue.scan import DatasetRules
from helpers.data.catalogue.tables import TableRule
from helpers.data.plan.buckets import BucketPlan, DatasetColumns
from helpers.data.plan.targets import CropAspect, CropStyle, ResolutionRule
from helpers.storage.atomic import write_file, write_json
from helpers.storage.memo import digest_of

_COLUMNS = "plan.npy"
_TABLES = "plan.json"


def rules_of(dataset: DatasetConfig, seed: int = 0) -> DatasetRules:
    """The rules of a configured dataset for sizes, crops and captions. Shuffled captions are drawn from `seed`."""
    resolution = ResolutionRule(
        resolution=dataset.resolution,
        resolution_type=cast(Literal["area", "pixel"], dataset.resolution_type),
        alignment=dataset.aspect_bucket_alignment,
        crop=dataset.crop,
        crop_style=cast(CropStyle, dataset.crop_style),
        crop_aspect=cast(CropAspect, dataset.crop_aspect),
        aspect_buckets=dataset.crop_aspect_buckets,
        minimum_image_size=dataset.minimum_image_size or 0,
        maximum_image_size=dataset.maximum_image_size or 0,
        target_downsample_size=dataset.target_downsample_size or 0,
        minimum_aspect=dataset.minimum_aspect or 0,
        maximum_aspect=dataset.maximum_aspect or math.inf,
        bucket_sizes=dataset.bucket_sizes,
        rounding=dataset.aspect_bucket_rounding,
    )
    captions = CaptionRule(
        strategy=cast(CaptionStrategy, dataset.caption_strategy),
        instance_prompt=dataset.instance_prompt or "",
        prepend_instance_prompt=dataset.prepend_instance_prompt,
        only_instance_prompt=dataset.only_instance_prompt,
        fallback=dataset.fallback_caption,
        extensions=dataset.caption_endings,
        json_key=dataset.json.caption_key if dataset.json is not None else "caption",
        multiple=dataset.multiple_captions,
        filters=dataset.caption_filters,
        shuffle=TagShuffle(seed, dataset.keep_tags, dataset.tag_separator) if dataset.shuffle_tags else None,
    )
    companions = tuple((role, of.id) for role, of in dataset.companions.items())
    return DatasetRules(dataset.id, resolution, captions, _tables(dataset), companions, dataset.alpha_is_mask)


def rules_of_companions(companions: DatasetConfig, datasets: Sequence[DatasetConfig]) -> DatasetRules:
    """The rules for a dataset of companions: each must be readable, and an image of `datasets` must have its name."""
    pairs = [(dataset.id, role) for dataset in datasets for role, of in dataset.companions.items() if of.id == companions.id]
    captions = CaptionRule("instanceprompt", instance_prompt="companion")  # nobody reads it, but only images with a caption are in use
    return DatasetRules(companions.id, ResolutionRule(), captions, role=pairs[0][1], users=tuple(name for name, _ in pairs))


def companions_of_all(datasets: Sequence[DatasetConfig]) -> dict[str, DatasetConfig]:
    """The datasets of companions that some datasets name, by id."""
    return {of.id: of for dataset in datasets for of in dataset.companions.values()}


def _tables(dataset: DatasetConfig) -> tuple[TableRule, ...]:
    """The tables that a dataset takes sizes or captions from; a single one if it has both."""
    return tuple(
        _table(dataset, kind, table, captions=kind == dataset.caption_table, sizes=kind == dataset.metadata_backend)
        for kind, table in dataset.tables_in_use.items()
    )


def _table(dataset: DatasetConfig, kind: str, table: TableConfig, *, captions: bool, sizes: bool) -> TableRule:
    return TableRule(
        path=_table_path(dataset, table),
        format=table_format(table.path) or kind,
        filename_column=table.filename_column,
        includes_extension=table.identifier_includes_extension,
        caption_column=table.caption_column if captions else None,
        fallback_caption_column=table.fallback_caption_column if captions else None,
        width_column=table.width_column if sizes else None,
        height_column=table.height_column if sizes else None,
        lists=dataset.multiple_captions,
    )


def _table_path(dataset: DatasetConfig, table: TableConfig) -> str:
    """The path for a `TableRule`: a key if the table is in the dataset's folder (so that it is not a stray file there), else absolute."""
    if dataset.instance_data_dir is None:
        return table.path
    folder = os.path.abspath(dataset.instance_data_dir)
    path = Path(os.path.normpath(os.path.join(folder, Path(table.path).expanduser())))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def columns_of(dataset: DatasetConfig, catalogue: Catalogue, seed: int, epoch: int = 0) -> DatasetColumns:
    """The images of a dataset that are in use, with the draws for their crops, and the faces that were found.

    The address of a draw is (seed, dataset, key); where crops are redrawn each epoch, (seed, epoch, dataset, key).
    """
    rule = rules_of(dataset).resolution
    columns = catalogue.columns(dataset.id)
    fixed, redrawn = (seed, dataset.id), (seed, epoch, dataset.id)

    def draw(name: str, anew: bool = dataset.vae_cache_clear_each_epoch) -> NDArray[np.float64]:
        address = redrawn if anew else fixed
        return np.array([uniform(name, *address, key) for key in catalogue.keys(dataset.id)])

    drawn = rule.style == "random"
    face_x, face_y = face_middles(catalogue, dataset.id) if rule.style == "face" else (None, None)
    return DatasetColumns(
        dataset=dataset.id,
        rule=rule,
        rows=columns.rows,
        width=columns.width,
        height=columns.height,
        crop_u=draw("crop_u") if drawn else None,
        crop_v=draw("crop_v") if drawn else None,
        aspect_u=draw("aspect_u", anew=dataset.redraws_aspects) if rule.draws_aspect else None,
        face_x=face_x,
        face_y=face_y,
        flip=draw("flip") < 0.5 if dataset.flip else None,
    )


def without_a_face(columns: Sequence[DatasetColumns]) -> dict[str, NDArray[np.int64]]:
    """For every dataset that is cropped around faces, the catalogue rows of the images in which none was found."""
    return {of.dataset: of.rows[np.isnan(of.face_x)] for of in columns if of.rule.style == "face" and of.face_x is not None}


def plan_inputs(datasets: Sequence[DatasetConfig], catalogue: Catalogue, seed: int) -> str:
    """A digest of everything that the plan depends on: the images in use, and the settings of their datasets."""
    listed: dict[str, Any] = {
        "preserve_data_backend_cache": False,
        "skip_file_discovery": "",
    }  # how they are found
    said = [dataclasses.asdict(dataclasses.replace(dataset, **listed)) for dataset in datasets]
    return digest_of(said, [catalogue.revision(dataset.id) for dataset in datasets], seed)


def save_plan(plan: BucketPlan, folder: Path) -> str:
    """Write a plan for `load_plan` => its `plan_digest`. Raises StorageError."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = io.BytesIO()
    np.save(columns, plan.columns, allow_pickle=False)
    write_file(folder / _COLUMNS, columns.getvalue())
    write_json(folder / _TABLES, {"datasets": plan.datasets, "shapes": [list(shape) for shape in plan.shapes]})
    return plan_digest(folder)


def plan_digest(folder: Path) -> str:
    """A digest of the bytes of the plan in a folder; "" if there is none."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for name in (_COLUMNS, _TABLES):
            with (folder / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError:
        return ""
    return digest.hexdigest()


def load_plan(folder: Path) -> BucketPlan:
    """The plan in a folder. Its columns are memory-mapped, so the processes of a machine share their memory."""
    tables = json.loads((folder / _TABLES).read_bytes())
    columns = np.load(folder / _COLUMNS, mmap_mode="r", allow_pickle=False)
    return BucketPlan(tuple(tables["datasets"]), tuple(Size(*shape) for shape in tables["shapes"]), columns)


def restricted(plan: BucketPlan, rows: NDArray[np.int64]) -> BucketPlan:
    """The plan of some rows alone."""
    if len(rows) == len(plan):
        return plan  # which stays mapped
    columns = plan.columns[rows]
    kept, columns["shape"] = np.unique(columns["shape"], return_inverse=True)
    return BucketPlan(plan.datasets, tuple(plan.shapes[shape] for shape in kept), columns)
