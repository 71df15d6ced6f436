"""From configured datasets to planned data: list the files, read sizes and captions, find faces, plan the crops.

The first process does the work and writes catalogue and plan into CACHE_DIR; the others read them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.base.progress import late_bar
from helpers.data.base.sample import MASK
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.faces import find_faces
from helpers.data.catalogue.masks import ALPHA, BRIGHTNESS, measure_masks
from helpers.data.catalogue.scan import Refreshed, ScanOptions, ScanResult, judge, refresh
from helpers.data.encode.companions import companions_of
from helpers.data.plan.buckets import plan
from helpers.data.planned import PlannedData
from helpers.data.planning import (
    columns_of,
    companions_of_all,
    load_plan,
    plan_digest,
    plan_inputs,
    rules_of,
    rules_of_companions,
    save_plan,
    without_a_face,
)
from helpers.data.settings import DataContext
from helpers.data.sources import open_source
from helpers.storage.database import DamagedDatabaseError, remove_database


class Scanner:
    """Scans and plans the datasets of a run, and keeps for the report what it found. If nothing changed, a start opens no image."""

    def __init__(self, datasets: Sequence[DatasetConfig], context: DataContext) -> None:
        self.results: list[ScanResult] = []  # of each dataset; empty in other processes than the first, like what follows
        self.companions: list[tuple[str, ScanResult]] = []  # of each dataset of companions, with its role
        self.faceless: Mapping[str, NDArray[np.int64]] = {}  # what `without_a_face` returns
        self._datasets = datasets
        self._companions = companions_of_all(datasets)
        self._sources = {dataset.id: open_source(dataset) for dataset in (*datasets, *self._companions.values())}
        self._context = context
        self._settings = context.settings
        self._workers = context.workers

    def run(self) -> PlannedData:
        """Raises DataError where no image of a dataset can be trained on, StorageError, and Interrupted when stopped."""
        folder = self._settings.cache_dir
        with self._workers.phase():
            if self._workers.is_first:
                catalogue = self._intact_catalogue(folder / "catalogue.sqlite")
                catalogue.forget_failures()
                self._scan_all(catalogue)
                self.faceless = self._make_plan(catalogue, folder / "plan")
        if not self._workers.is_first:
            catalogue = Catalogue(folder / "catalogue.sqlite")
        companions = [companions_of(dataset, self._context.family) for dataset in self._datasets]
        return PlannedData(self._datasets, self._sources, companions, catalogue, load_plan(folder / "plan"), self._settings.seed)

    def _intact_catalogue(self, path: Path) -> Catalogue:
        """The catalogue without what has changed since it was written: that is read from the files again, and the user gets a line."""
        try:
            catalogue = Catalogue(path)
            if damaged := catalogue.forget_damaged():
                self._context.report.chapter("dataset", f"{path}: damaged rows, whose files are read again: {damaged:,}")
        except DamagedDatabaseError as error:
            self._context.report.chapter("dataset", f"{error} It is built again.")
            remove_database(path)
            catalogue = Catalogue(path)
        return catalogue

    def _scan_all(self, catalogue: Catalogue) -> None:
        refreshed = {name: self._refresh_companions(name, catalogue) for name in self._companions}  # first: images are paired with them
        self.results = [self._scan(dataset, catalogue) for dataset in self._datasets]
        self.companions = [self._judge_companions(name, found, catalogue) for name, found in refreshed.items()]
        for dataset in self._datasets:
            if dataset.crop and dataset.crop_style == "face":
                self._find_faces(dataset, catalogue)

    def _scan(self, dataset: DatasetConfig, catalogue: Catalogue) -> ScanResult:
        left_out = self._settings.undecodable
        with late_bar(self._context.report, f"scan {dataset.id}", "files") as progress:
            options = ScanOptions(None, progress, self._workers.should_stop, dataset.trusts_listing)
            rules, source = rules_of(dataset, self._settings.seed), self._sources[dataset.id]
            refreshed = refresh(source, rules, catalogue, options)
        if dataset.alpha_is_mask:
            self._measure_masks(dataset.id, ALPHA, catalogue)
        undecodable = None if left_out is None else left_out.get(dataset.id, ())
        return judge(source, rules, catalogue, refreshed, options, undecodable)

    def _refresh_companions(self, name: str, catalogue: Catalogue) -> Refreshed:
        companions = self._companions[name]
        rules = rules_of_companions(companions, self._datasets)
        with late_bar(self._context.report, f"scan {name}", "files") as progress:
            options = ScanOptions(None, progress, self._workers.should_stop, companions.trusts_listing)
            refreshed = refresh(self._sources[name], rules, catalogue, options)
        if rules.role == MASK:
            self._measure_masks(name, BRIGHTNESS, catalogue)
        return refreshed

    def _judge_companions(self, name: str, found: Refreshed, catalogue: Catalogue) -> tuple[str, ScanResult]:
        rules = rules_of_companions(self._companions[name], self._datasets)
        options = ScanOptions(should_stop=self._workers.should_stop)
        return rules.role, judge(self._sources[name], rules, catalogue, found, options, undecodable=())

    def _measure_masks(self, name: str, source: str, catalogue: Catalogue) -> None:
        threads, should_stop = self._settings.threads, self._workers.should_stop
        with late_bar(self._context.report, f"measure masks {name}", "files") as progress:
            measure_masks(self._sources[name], name, source, catalogue, threads=threads, on_progress=progress, should_stop=should_stop)

    def _find_faces(self, dataset: DatasetConfig, catalogue: Catalogue) -> None:
        with late_bar(self._context.report, f"find faces {dataset.id}", "images") as progress:
            find_faces(
                self._sources[dataset.id],
                dataset.id,
                catalogue,
                threads=self._settings.threads,
                on_progress=progress,
                should_stop=self._workers.should_stop,
            )

    def _make_plan(self, catalogue: Catalogue, folder: Path) -> dict[str, NDArray[np.int64]]:
        """Write the plan of epoch 0, unless the one on disk was made from the same inputs. Returns what `without_a_face` returns."""
        has_faces = any(dataset.crop and dataset.crop_style == "face" for dataset in self._datasets)
        inputs, memo = plan_inputs(self._datasets, catalogue, self._settings.seed), self._context.memo
        if not has_faces and memo.load_value("plan", inputs) == plan_digest(folder):
            return {}
        columns = [columns_of(dataset, catalogue, self._settings.seed) for dataset in self._datasets]
        memo.forget("plan")  # first: a start killed while it writes leaves files that no memo vouches for
        memo.save_value("plan", inputs, save_plan(plan(columns), folder))
        return without_a_face(columns)
