from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from helpers.data.buckets import DatasetColumns, plan
from helpers.data.captions import CaptionRule
from helpers.data.catalogue import Catalogue
from helpers.data.report import dataset_report, summary
from helpers.data.scan import DatasetRules, ScanResult, scan
from helpers.data.table_join import JoinedTable
from helpers.data.targets import ResolutionRule
from helpers.storage.memory import MemoryBackend


def picture(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def test_the_report_adds_up_and_names_every_file_left_out(tmp_path: Path) -> None:
    sets = {
        "tall": {"a.png": picture(1000, 1500), "b.png": picture(800, 1200), "c.png": picture(100, 100), "d.md": b""},
        "wide": {"é.png": picture(1920, 1080)},
    }
    rule = ResolutionRule(1.0, minimum_image_size=0.1)
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        results = [scan(MemoryBackend(files), DatasetRules(name, rule, CaptionRule()), catalogue) for name, files in sets.items()]
        columns = {name: catalogue.columns(name) for name in sets}
        made = plan([DatasetColumns(name, rule, found.rows, found.width, found.height) for name, found in columns.items()])
        report = json.loads(json.dumps(dataset_report(results, made, catalogue)))
    tall, wide = report["datasets"]
    assert tall == {
        "id": "tall",
        "found": 4,
        "used": 2,
        "left_out": [
            {"key": "c.png", "reason": "below 0.1 megapixels: 100x100"},
            {"key": "d.md", "reason": "not an image: its name ends in .md"},
        ],
        "buckets": {"832x1216": 2},
        "upscaled": 1,
        "cropped_share": round(1 - 1216 / 1248, 4),
    }
    assert wide["buckets"] == {"1344x768": 1} and wide["left_out"] == [] and wide["upscaled"] == 0
    for entry in (tall, wide):
        assert entry["found"] == entry["used"] + len(entry["left_out"])
        assert sum(entry["buckets"].values()) == entry["used"]


def test_the_summary_is_one_line() -> None:
    result = ScanResult("portraits", 12_408, 12_377, 31, {"below 512 px": 22, "unreadable": 9}, 0, 0, 0, 0)
    assert summary(result, 11) == "portraits: 12,408 files = 12,377 used + 31 left out (22 below 512 px, 9 unreadable) · 11 shapes"
    assert summary(ScanResult("one", 1, 1, 0, {}, 1, 0, 0, 1), 1) == "one: 1 files = 1 used + 0 left out · 1 shape"
    told = (JoinedTable("t.csv", 1_200, 2, 10), JoinedTable("u.csv", 5, 0, 0))
    result = replace(result, kinds={"several rows": 31}, tables=told)
    assert summary(result, 11) == (
        "portraits: 12,408 files = 12,377 used + 31 left out (31 several rows) · 12 of 1,200 rows of t.csv name no image · 11 shapes"
    )
