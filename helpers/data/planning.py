"""From configured data sets to the plan that all processes share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.buckets import BucketPlan, DatasetColumns, ResolutionRule
from helpers.data.captions import CaptionRule
from helpers.data.catalogue import Catalogue
from helpers.data.draws import uniform
from helpers.data.sample import Size
from helpers.data.scan import DatasetRules
from helpers.storage.atomic import write_file, write_json

_COLUMNS = "plan.npy"
_TABLES = "plan.json"


def rules_of(dataset: DatasetConfig) -> DatasetRules:
    """What a configured data set says of sizes, cuts and captions."""
    resolution = ResolutionRule(
        resolution=dataset.resolution,
        resolution_type=cast(Literal["area", "pixel"], dataset.resolution_type),
        alignment=dataset.aspect_bucket_alignment,
        crop=dataset.crop,
        crop_style=cast(Literal["center", "corner", "random"], dataset.crop_style),
        crop_aspect=cast(Literal["square", "preserve"], dataset.crop_aspect),
        minimum_image_size=dataset.minimum_image_size or 0,
    )
    captions = CaptionRule(
        strategy=cast(Literal["textfile", "filename", "instanceprompt"], dataset.caption_strategy),
        instance_prompt=dataset.instance_prompt or "",
        prepend_instance_prompt=dataset.prepend_instance_prompt,
        only_instance_prompt=dataset.only_instance_prompt,
    )
    return DatasetRules(dataset.id, resolution, captions)


def columns_of(dataset: DatasetConfig, catalogue: Catalogue, seed: int, epoch: int = 0) -> DatasetColumns:
    """The usable images of a data set, with the place of each random cut drawn for (seed, data set, key).

    Where the data set is redrawn each epoch, for (seed, epoch, data set, key).
    """
    rule = rules_of(dataset).resolution
    columns = catalogue.columns(dataset.id)
    address = (seed, epoch, dataset.id) if dataset.vae_cache_clear_each_epoch else (seed, dataset.id)

    def draw(name: str) -> NDArray[np.float64]:
        return np.array([uniform(name, *address, key) for key in catalogue.keys(dataset.id)])

    drawn = rule.style == "random"
    return DatasetColumns(
        dataset=dataset.id,
        rule=rule,
        rows=columns.rows,
        width=columns.width,
        height=columns.height,
        crop_u=draw("crop_u") if drawn else None,
        crop_v=draw("crop_v") if drawn else None,
        flip=draw("flip") < 0.5 if dataset.flip else None,
    )


def save_plan(plan: BucketPlan, folder: Path) -> None:
    """Put a plan where `load_plan` finds it. StorageError when it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = io.BytesIO()
    np.save(columns, plan.columns, allow_pickle=False)
    write_file(folder / _COLUMNS, columns.getvalue())
    write_json(folder / _TABLES, {"datasets": plan.datasets, "shapes": [list(shape) for shape in plan.shapes]})


def load_plan(folder: Path) -> BucketPlan:
    """The plan in a folder; its columns are mapped, so that the processes of a machine share their memory."""
    tables = json.loads((folder / _TABLES).read_bytes())
    columns = np.load(folder / _COLUMNS, mmap_mode="r", allow_pickle=False)
    return BucketPlan(tuple(tables["datasets"]), tuple(Size(*shape) for shape in tables["shapes"]), columns)
