"""The page on datasets says what the code does: keys, defaults, sizes, cuts, reasons."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from PIL import Image

from helpers.config.aspects import AspectBucket, read_map
from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import DatasetConfig, Entry, JsonCaptionConfig, TableConfig, TextCacheConfig
from helpers.config.declare import options_of
from helpers.config.options import OPTIONS
from helpers.data.base.images import EXTENSIONS, decode_mask
from helpers.data.base.sample import ROLES, Size
from helpers.data.plan.buckets import geometry
from helpers.data.plan.targets import ResolutionRule, target_size
from tests.documentation.pages import ROOT, Page

PAGE = Page.named("documentation/DATALOADER.md")
PAGES = (
    "DATALOADER",
    "QUICKSTART",
    "QUICKSTART_SD2",
    "QUICKSTART_SD3",
    "QUICKSTART_FLUX",
    "SIGMA",
    "HUNYUAN_DIT",
    "DEEPFLOYD",
    "DREAMBOOTH",
)
BLOCKS = [block.text for name in PAGES for block in Page.named(f"documentation/{name}.md").blocks("json", "json5")]
SAMPLES = [text for text in BLOCKS if text.startswith("[")]  # the others are settings of editors


def size(text: str) -> Size:
    width, height = text.split("x")
    return Size(int(width), int(height))


@pytest.mark.parametrize("sample", SAMPLES)
def test_json_samples_are_accepted_as_they_stand(sample: str, tmp_path: Path) -> None:
    text = sample.replace("/home/user", str(tmp_path))
    for folder in re.findall(r'"instance_data_dir": "([^"]+)"', text):
        (Path(folder) / "10_dog").mkdir(parents=True) if '"layout": "kohya"' in text else Path(folder).mkdir(parents=True, exist_ok=True)
        for table in re.findall(r'"path": "([^"]+\.(?:parquet|jsonl|csv))"', text):
            (Path(folder) / table).touch()
    for name in ("rows", "tars", "captions"):
        (tmp_path / name).mkdir()
    for number in range(3):
        (tmp_path / "tars" / f"{number:05}.tar").touch()
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    options = {name: item.default for name, item in OPTIONS.items()}
    data = read_dataloader(tmp_path / "data.json", options)
    assert data.problems == () and data.notes == ()
    assert data.datasets


def test_the_sample_makes_masks_of_cutouts(tmp_path: Path) -> None:
    cutouts = tmp_path / "subject-cutouts"
    cutouts.mkdir()
    alpha = Image.new("L", (8, 6))
    alpha.paste(255, (2, 1, 5, 4))
    color = Image.new("RGB", alpha.size, "red")
    color.putalpha(alpha)
    color.save(cutouts / "cat.png")
    exec(PAGE.section("Loss masks").block("python").replace("/home/user", str(tmp_path)), {})
    made = decode_mask((tmp_path / "subject-masks" / "cat.png").read_bytes())
    assert made.tobytes() == alpha.tobytes()


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Every entry", Entry),
        ("Image datasets", DatasetConfig),
        ("`parquet`, `jsonl` and `csv`", TableConfig),
        ("object `json`", JsonCaptionConfig),
        ("text_embeds", TextCacheConfig),
    ],
)
def test_the_tables_hold_every_key_that_has_an_effect_with_its_default(title: str, kind: type) -> None:
    inherited = {item.name for item in options_of(Entry)} if kind is not Entry else set()
    works = {item.name for item in options_of(kind) if not item.not_yet and not item.does_nothing} - inherited
    [table] = list(PAGE.section("Keys").section(title).tables())[:1]
    told = {re.findall(r"\w+", row[0])[0]: row[1].strip("`") for row in table[1:]}
    assert told.keys() == works
    generated = {
        row[0]: row[1].strip("`") for rows in Page.named("OPTIONS.md").section(title).tables() for row in rows if row[0].startswith("`")
    }
    for name, default in told.items():
        [as_generated] = {text for cell, text in generated.items() if re.findall(r"\w+", cell)[0] == name and "--" not in cell}
        assert default == as_generated, name


def test_the_sizes_are_those_of_the_code() -> None:
    [heading, *rows] = next(PAGE.section("Resolution and buckets").tables())
    assert len(rows) >= 5
    for row in rows:
        for cell, setting in zip(row[1:], heading[1:], strict=True):
            kind, resolution = setting.replace("`", "").split()
            rule = ResolutionRule(float(resolution), cast(Literal["area", "pixel"], kind))
            assert target_size(size(row[0]), rule) == size(cell), f"{row[0]}, {setting}"


def test_the_cuts_are_those_of_the_code() -> None:
    [_, *rows] = next(PAGE.section("Crops").tables())
    assert len(rows) >= 5
    for picture, crop, aspect, style, resized, target, corner, lost in ([cell.strip("`") for cell in row] for row in rows):
        chosen: dict[str, Any] = {name: text for name, text in (("crop_aspect", aspect), ("crop_style", style)) if text}
        rule = ResolutionRule(crop=crop == "true", **chosen)
        cut = geometry(size(picture), rule)
        assert (cut.resized, cut.target) == (size(resized), size(target)), picture
        assert f"{cut.top}, {cut.left}" == corner
        assert f"{100 * (1 - cut.target.area / cut.resized.area):.1f} %" == lost


def test_the_drawn_shapes_are_those_of_the_code() -> None:
    [heading, *rows] = next(PAGE.section("Random aspect ratios").tables())
    draws = (np.arange(100) + 0.5) / 100
    for row in rows:
        for cell, setting in zip(row[1:], heading[1:], strict=True):
            kind, resolution = setting.partition(":")[0].replace("`", "").split()
            rule = ResolutionRule(
                float(resolution),
                cast(Literal["area", "pixel"], kind),
                crop=True,
                crop_aspect="random",
                aspect_buckets=tuple(AspectBucket(aspect) for aspect in (0.67, 1, 1.5)),
            )
            assert ", ".join(sorted({str(target_size(size(row[0]), rule, u)) for u in draws}, key=size)) == cell, row[0]


def test_the_shrinking_of_large_pictures_is_that_of_the_code() -> None:
    [_, *rows] = next(PAGE.section("Large images").tables())
    assert len(rows) >= 5
    for picture, largest, shrunk, resized, corner, lost in rows:
        rule = ResolutionRule(
            crop=True, crop_style="center", maximum_image_size=float(largest or 0), target_downsample_size=float(shrunk or 0)
        )
        cut = geometry(size(picture), rule)
        assert (cut.resized, f"{cut.top}, {cut.left}") == (size(resized), corner), picture
        assert f"{100 * (1 - cut.target.area / cut.resized.area):.1f} %" == lost


def test_the_example_of_own_sizes_does_what_the_page_says(tmp_path: Path) -> None:
    [example] = [span for span in PAGE.section("Resolution and buckets").spans() if span.startswith("{")]
    (tmp_path / "map.json").write_text(example)
    rule = ResolutionRule(bucket_sizes=read_map(tmp_path / "map.json", alignment=64, rounding=2))
    assert target_size(Size(6000, 4000), ResolutionRule()) == Size(1216, 832)
    assert target_size(Size(6000, 4000), rule) == Size(1152, 768)
    assert target_size(Size(4000, 6000), rule) == Size(768, 1152)


def test_the_formats_are_those_of_the_code() -> None:
    files = PAGE.section("Files")
    assert {span for span in files.spans() if span in EXTENSIONS} == set(EXTENSIONS)


def test_the_reasons_for_leaving_a_file_out_are_those_of_the_code() -> None:
    [_, *rows] = next(PAGE.section("Files").tables())
    names = ("scan", "listing", "captions", "tables", "table_join", "images", "targets", "codec", "pipeline", "masks", "items")
    modules = [path for name in (*names, "tar", "two_folders", "webdataset") for path in sorted((ROOT / "helpers").rglob(f"{name}.py"))]
    assert len(modules) >= len(names)
    texts = [path.read_text(encoding="utf-8").replace("{rules.role}", "{role}") for path in modules]
    sources = "".join(text.replace("{role}", role) for text in texts for role in ROLES)
    listed = {reason for row in rows for reason in re.findall(r"`([^`]+)`", row[0])}
    said = set(re.findall(r'(?:Error\(|(?:problem"?\]?|reason) = \(?|return )\s*f?"([a-z][\w\- ]+): ', sources))
    assert len(said) >= 10 and said <= listed
    assert all(reason.removesuffix(" ...") in sources for reason in listed)


def test_every_key_is_available() -> None:
    keys = [item for kind in (Entry, DatasetConfig, TextCacheConfig) for item in options_of(kind)]
    assert not [item.name for item in keys if item.not_yet or item.unavailable_choices], "the page has to say what is not available yet"
