"""What became of the files of every data set: for people one line, for programs dataset_report.json."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.data.buckets import BucketPlan
from helpers.data.catalogue import Catalogue
from helpers.data.order import Mix
from helpers.data.scan import ScanResult


def dataset_report(
    results: Sequence[ScanResult],
    plan: BucketPlan,
    catalogue: Catalogue,
    faceless: Mapping[str, NDArray[np.int64]] | None = None,
    failed: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The content of dataset_report.json, data sets in the order of `results`, which is the plan's.

    `faceless` holds, for the data sets that are cut around faces, the catalogue's rows of the images in which none was found.
    `failed` are images of the plan that turned out not to be encodable, by catalogue row, as "kind: detail". `upscaled` counts images
    resized to more pixels than they have; `cropped_share` is the mean share of a resized image's area that the cut removes, from 0 to 1.
    """
    failed = failed or {}
    usable = ~np.isin(plan.columns["row"], list(failed))
    lost: dict[str, list[dict[str, str]]] = {}
    for row, reason in failed.items():
        sample = catalogue.sample(row)
        lost.setdefault(sample.dataset, []).append({"key": sample.key, "reason": reason})
    rows = plan.columns[usable]
    entries = []
    for index, result in enumerate(results):
        mine = rows[rows["dataset"] == index]
        entries.append(_entry(result, mine, plan, catalogue, lost.get(result.dataset, [])))
        if faceless and result.dataset in faceless:
            entries[-1]["without_a_face"] = int(np.isin(mine["row"], faceless[result.dataset]).sum())
    return {"datasets": entries}


def _entry(result: ScanResult, rows: NDArray[Any], plan: BucketPlan, catalogue: Catalogue, lost: list[dict[str, str]]) -> dict[str, Any]:
    """One data set: `rows` of the plan that are used, `lost` after the scan."""
    counts = np.bincount(rows["shape"], minlength=len(plan.shapes))
    areas = np.array([shape.area for shape in plan.shapes], np.float64)
    kept = areas[rows["shape"]] / (rows["resized_width"].astype(np.float64) * rows["resized_height"])
    left_out = [{"key": entry.key, "reason": entry.reason} for entry in catalogue.left_out(result.dataset)]
    return {
        "id": result.dataset,
        "found": result.found,
        "used": result.used - len(lost),
        "left_out": sorted(left_out + lost, key=lambda item: item["key"]),
        **({"tables": [dataclasses.asdict(table) for table in result.tables]} if result.tables else {}),
        "buckets": {str(shape): int(count) for shape, count in zip(plan.shapes, counts, strict=True) if count},
        "upscaled": int(rows["upscaled"].sum()),
        "cropped_share": round(float(1 - kept.mean()), 4) if len(kept) else 0.0,
    }


def lost_line(failed: Mapping[int, str]) -> str:
    """One line for the console about images that turned out not to be encodable."""
    kinds = Counter(reason.partition(":")[0] for reason in failed.values())
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return f"{len(failed):,} more left out, found while encoding ({counts}); dataset_report.json names them"


def summary(result: ScanResult, shapes: int) -> str:
    """One line for the console, such as `portraits: 31 files = 29 used + 2 left out (2 unreadable) · 4 shapes`."""
    line = f"{result.dataset}: {result.found:,} files = {result.used:,} used + {result.left_out:,} left out"
    if result.kinds:
        line += " (" + ", ".join(f"{count:,} {kind}" for kind, count in result.kinds.items()) + ")"
    for table in result.tables:
        if stray := table.unnamed + table.without_image:
            line += f" · {stray:,} of {table.rows:,} rows of {table.path} name no image"
    return line + f" · {shapes:,} shape{'s' if shapes != 1 else ''}"


def mix_summary(datasets: Sequence[str], mix: Mix) -> str:
    """One line for the console, such as `faces 60 % + streets 40 % of the micro-batches, for 75 % of an epoch, until faces is used up`."""
    until = mix.even_from
    shares = mix.early * mix.counts / (until * mix.counts.sum())
    line = " + ".join(f"{dataset} {100 * share:.0f} %" for dataset, share in zip(datasets, shares, strict=True)) + " of the micro-batches"
    return line if until == 1 else f"{line}, for {100 * until:.0f} % of an epoch, until {datasets[int(mix.early.argmax())]} is used up"
