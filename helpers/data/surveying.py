"""What users are told about their data: dataset_report.json, and lines on the console."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from helpers.data.base.sample import CONDITION, MASK
from helpers.data.planned import PlannedData
from helpers.data.planning import restricted
from helpers.data.report.dataset_report import (
    REPORT,
    caption_report,
    companions_report,
    dataset_report,
    long_sides_line,
    lost_line,
    mask_line,
    mask_report,
    summary,
)
from helpers.data.report.overlaps import all_entries, kohya_line, overlap_lines
from helpers.data.report.survey import Survey
from helpers.data.report.thumbnails import thumbnails
from helpers.data.scanning import Scanner
from helpers.data.settings import DataContext
from helpers.storage.atomic import write_json
from helpers.storage.memo import digest_of

SECTIONS = {CONDITION: "conditions", MASK: "masks"}  # of the report, and of the console, about datasets of companions by their role


class Surveyor:
    """Describes the data once it is planned, and again when encoding found images that cannot be decoded. Only the first process does."""

    def __init__(self, data: PlannedData, scanner: Scanner, context: DataContext) -> None:
        self._data = data
        self._scanner = scanner
        self._context = context
        self._workers = context.workers
        self._report = context.report
        self._memo = context.memo
        self._path = context.settings.output_dir / REPORT
        # What the report on disk knows of:
        self._failed: dict[int, str] = {}  # images that could not be encoded: catalogue row => reason
        self._unread = 0  # images whose bytes nobody has read

    def describe(self, anew: bool = False) -> None:
        """Report what was found. The report of an earlier start is kept if nothing changed since, unless it is to be written anew."""
        with self._workers.phase():
            if not self._workers.is_first:
                return
            is_news = anew or not self._is_known()
            if is_news:
                self._write({})
            self._report_lines()
            if is_news:
                self._report_unread_captions()

    def update(self) -> None:
        """Bring the report up to date with what encoding found."""
        if not self._workers.is_first:
            return
        failed = self._data.catalogue.failures()
        is_news = failed != self._failed
        if is_news or self._count_unread() != self._unread:
            self._write(failed)
        if is_news:
            self._report.chapter("dataset", lost_line(failed))

    def _is_known(self) -> bool:
        """Whether the report of an earlier start is on disk and still true."""
        known = self._memo.load_value("survey", self._inputs())
        if known is None or self._scanner.faceless or not (self._path.is_file() and self._path.with_suffix(".html").is_file()):
            return False
        self._unread = known["unread"]
        return True

    def _write(self, failed: Mapping[int, str]) -> None:
        data, plan = self._data, self._data.plan
        report = dataset_report(self._scanner.results, plan, data.catalogue, self._scanner.faceless, failed)
        for role, name in SECTIONS.items():
            if results := [result for its_role, result in self._scanner.companions if its_role == role]:
                report[name] = companions_report(results, data.catalogue)
        lengths = self._context.family.caption_lengths()
        for entry, dataset in zip(report["datasets"], data.datasets, strict=True):
            entry["captions"] = caption_report(entry["id"], data.catalogue, lengths, self._memo)
            if dataset.mask_data is not None:
                entry["mask"] = mask_report(dataset, data.catalogue)
        self._failed, self._unread = dict(failed), self._count_unread()
        write_json(self._path, report)
        trained = restricted(plan, np.flatnonzero(~np.isin(plan.columns["row"], list(failed)))) if failed else plan
        sources = [data.sources[dataset.id] for dataset in data.datasets]
        masks = [data.sources[(dataset.mask or dataset).id] if dataset.mask_data is not None else None for dataset in data.datasets]
        threads = self._context.settings.threads
        self._report.surveyed(Survey(report, lambda: thumbnails(trained, sources, data.catalogue, self._memo, threads, masks)))
        if not failed:
            self._memo.save_value("survey", self._inputs(), {"unread": self._unread})

    def _report_lines(self) -> None:
        columns, data_shapes = self._data.plan.columns, self._data.plan.shapes
        for index, result in enumerate(self._scanner.results):
            shapes = np.bincount(columns["shape"][columns["dataset"] == index])
            self._report.chapter("dataset", summary(result, int(np.count_nonzero(shapes))))
            if line := long_sides_line(self._data.datasets[index], [data_shapes[shape] for shape in np.flatnonzero(shapes).tolist()]):
                self._report.chapter("", f"{result.dataset}: {line}")
            if faceless := len(self._scanner.faceless.get(result.dataset, ())):
                text = f"none found in {faceless:,} of {result.used:,} images, which are cropped at the center"
                self._report.chapter("faces", f"{result.dataset}: {text}")
        for dataset in self._data.datasets:
            if line := kohya_line(dataset, self._data.catalogue):
                self._report.chapter("folders", f"{dataset.id}: {line}")
        for line in self._overlaps():
            self._report.chapter("overlap", line)
        for role, result in self._scanner.companions:
            self._report.chapter(SECTIONS[role], summary(result))
        for dataset, result in zip(self._data.datasets, self._scanner.results, strict=True):
            if dataset.mask_data is not None:
                self._report.chapter("masks", mask_line(dataset.id, result.used, mask_report(dataset, self._data.catalogue)))

    def _overlaps(self) -> list[str]:
        """What `overlap_lines` says, from an earlier start if nothing changed since."""
        entries = list(all_entries(self._data.datasets))
        if len(entries) < 2:
            return []
        revisions = [self._data.catalogue.revision(entry.id) for entry in entries]
        return self._memo.recall("overlaps", digest_of(self._inputs(), revisions), lambda: overlap_lines(entries, self._data.catalogue))

    def _report_unread_captions(self) -> None:
        """File names are the default captions. Users who wrote .txt captions should not learn from the result that nobody read them."""
        for dataset in self._data.datasets:
            by_name = dataset.caption_strategy == "filename" and not dataset.only_instance_prompt
            if by_name and (count := self._data.catalogue.caption_files(dataset.id)):
                text = f"captions are file names, and {count:,} .txt files are not read; caption_strategy textfile reads them"
                self._report.chapter("captions", f"{dataset.id}: {text}")

    def _count_unread(self) -> int:
        return sum(self._data.catalogue.unread(dataset.id) for dataset in self._data.datasets)

    def _inputs(self) -> str:
        return digest_of(self._data.digest(), self._path)
