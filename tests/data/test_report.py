from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, ScanResult, scan
from helpers.data.catalogue.table_join import JoinedTable
from helpers.data.plan.buckets import DatasetColumns, plan
from helpers.data.plan.targets import ResolutionRule
from helpers.data.report.dataset_report import caption_report, dataset_report, summary
from helpers.storage.memo import Memo
from tests.data.toys import WordLengths
from tests.storage.memory import MemoryBackend


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
    sizes, aspects = tall.pop("sizes"), tall.pop("aspects")
    assert {edge: count for edge, count in zip(sizes["edges"], sizes["counts"], strict=False) if count} == {0.5: 1, 1: 1}
    assert sum(aspects["counts"]) == 2 and aspects["counts"][aspects["edges"].index(0.648)] == 2  # 2:3
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
        "copies": [],
        "unread": 2,
        "skipped_folders": [],
    }
    assert wide["buckets"] == {"1344x768": 1} and wide["left_out"] == [] and wide["upscaled"] == 0
    for entry in (tall, wide):
        assert entry["found"] == entry["used"] + len(entry["left_out"])
        assert sum(entry["buckets"].values()) == entry["used"]


def test_the_summary_is_one_line() -> None:
    result = ScanResult("portraits", 12_408, 12_377, 31, {"below 512 px": 22, "unreadable": 9}, 0, 0, 0, 0)
    assert summary(result, 11) == "portraits: 12,408 files = 12,377 used + 31 left out (22 below 512 px, 9 unreadable) · 11 buckets"
    assert summary(ScanResult("one", 1, 1, 0, {}, 1, 0, 0, 1), 1) == "one: 1 files = 1 used + 0 left out · 1 bucket"
    tables = (JoinedTable("t.csv", 1_200, 2, 10), JoinedTable("u.csv", 5, 0, 0))
    result = replace(result, kinds={"several rows": 31}, tables=tables)
    assert summary(result, 11) == (
        "portraits: 12,408 files = 12,377 used + 31 left out (31 several rows) · 12 of 1,200 rows of t.csv name no image · 11 buckets"
    )


RULE = ResolutionRule(1.0)


def scanned(catalogue: Catalogue, files: dict[str, bytes], captions: CaptionRule | None = None) -> ScanResult:
    return scan(MemoryBackend(files), DatasetRules("set", RULE, captions or CaptionRule("textfile")), catalogue)


def entry(catalogue: Catalogue, result: ScanResult) -> dict[str, object]:
    found = catalogue.columns("set")
    made = plan([DatasetColumns("set", RULE, found.rows, found.width, found.height)])
    [told] = json.loads(json.dumps(dataset_report([result], made, catalogue)))["datasets"]
    return told


def test_copies_are_told_once_their_bytes_are_known_and_never_guessed(tmp_path: Path) -> None:
    files = {name: picture(1000, 1500) for name in ("a.png", "b.png", "c.png", "d.png")}
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        result = scanned(catalogue, files, CaptionRule("filename"))
        told = entry(catalogue, result)
        assert (told["copies"], told["unread"]) == ([], 4)
        rows = catalogue.columns("set").rows.tolist()
        catalogue.set_content(zip(rows, ["same", "other", "same"], strict=False))
        told = entry(catalogue, result)
        assert (told["copies"], told["unread"]) == ([["a.png", "c.png"]], 1)
        catalogue.add_failure(0, rows[2], "unreadable: half of it is missing", undecodable=True)
        catalogue.leave_out_undecodable()
        assert entry(catalogue, result)["copies"] == []


def test_captions_that_several_images_share_are_listed_commonest_first(tmp_path: Path) -> None:
    captions = {"a": "a dog", "b": "a cat", "c": "a dog", "d": "a cat", "e": "a dog", "f": "alone"}
    files = {f"{name}.png": picture(1000, 1500) for name in captions} | {f"{name}.txt": text.encode() for name, text in captions.items()}
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        scanned(catalogue, files)
        told = caption_report("set", catalogue, WordLengths(), Memo(tmp_path / "memo"))
    assert told["shared"] == [{"caption": "a dog", "images": 3}, {"caption": "a cat", "images": 2}]


class CountingLengths(WordLengths):
    def __init__(self) -> None:
        self.asked: list[str] = []

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        self.asked += captions
        return super().token_counts(captions)


def test_captions_are_measured_in_tokens_and_again_only_when_they_or_the_tokenizer_changed(tmp_path: Path) -> None:
    captions = {"a": "one", "b": "one two", "c": "three four", "d": " ".join(["many"] * 9), "e": "one"}
    files = {f"{name}.png": picture(1000, 1500) for name in captions} | {f"{name}.txt": text.encode() for name, text in captions.items()}
    lengths = CountingLengths()

    def told() -> dict[str, object]:
        return json.loads(json.dumps(caption_report("set", catalogue, lengths, Memo(tmp_path / "memo"))))

    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        scanned(catalogue, files)
        expected: dict[str, object] = {"distinct": 4, "counted": 4, "limit": 8, "truncated": 1, "tokens": [[1, 1], [2, 2], [9, 1]]}
        expected["shared"] = [{"caption": "one", "images": 2}]
        assert told() == told() == expected
        assert len(lengths.asked) == 4
        lengths.fingerprint = "another tokenizer"
        assert told() == expected and len(lengths.asked) == 8
        scanned(catalogue, files | {"e.txt": b"another caption"})
        assert told()["distinct"] == 5 and len(lengths.asked) == 13


def test_of_very_many_captions_an_even_choice_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.data.report.dataset_report.MOST_CAPTIONS_COUNTED", 10)
    files = {f"picture {number:02}.png": picture(1000, 1500) for number in range(25)}
    lengths = CountingLengths()
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        scanned(catalogue, files, CaptionRule("filename"))
        told = caption_report("set", catalogue, lengths, Memo(tmp_path / "memo"))
    assert (told["distinct"], told["counted"]) == (25, 7)
    assert lengths.asked == [f"picture {number:02}" for number in range(0, 25, 4)]
