"""The dataset report page has the right numbers, shows file names without obeying them, and is readable in a real browser at any width."""

from __future__ import annotations

import copy
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.data.base.sample import Geometry, Size
from helpers.data.report.dataset_report import ASPECT_EDGES, COVERAGE_EDGES, SIZE_EDGES
from helpers.data.report.survey import Survey, Thumbnail
from helpers.reporting.html_report import MOST_LEFT_OUT, PAGE, HtmlReport, findings, page, percent

EVIL = '<script>console.error("ran")</script>"\'&amp; \u202egnp.🐈‍⬛\udcff'
ENTRY: Mapping[str, Any] = {
    "id": "portraits",
    "found": 1_208,
    "used": 1_200,
    "left_out": [{"key": f"broken_{number}.jpg", "reason": "unreadable: it is cut off"} for number in range(8)],
    "buckets": {"832x1216": 1_100, "1024x1024": 99, "1216x832": 1},
    "upscaled": 24,
    "cropped_share": 0.1234,
    "sizes": {"edges": list(SIZE_EDGES), "counts": [0, 0, 0, 24, 1_176, 0, 0, 0, 0, 0]},
    "aspects": {"edges": list(ASPECT_EDGES), "counts": [0] * 6 + [1_100, 0, 99, 0, 1, 0, 0, 0, 0, 0, 0]},
    "copies": [["a.jpg", "b.jpg", "c.jpg"]],
    "unread": 0,
    "captions": {
        "distinct": 1_199,
        "counted": 1_199,
        "limit": 77,
        "truncated": 12,
        "tokens": [[9, 1_000], [77, 187], [78, 11], [400, 1]],
        "shared": [{"caption": "a portrait", "images": 2}],
    },
}


def entry(**changed: Any) -> dict[str, Any]:
    return {**copy.deepcopy(dict(ENTRY)), **changed}


def thumbnail(**changed: Any) -> Thumbnail:
    stream = io.BytesIO()
    Image.new("RGB", (96, 64), "teal").save(stream, "JPEG")
    geometry = Geometry(Size(640, 480), Size(112, 84), 10, 8, Size(96, 64), flip=True)
    values = {"dataset": "portraits", "key": "a.jpg", "caption": "a portrait", "geometry": geometry, "upscaled": False}
    return Thumbnail(**{**values, "jpeg": stream.getvalue(), **changed})


def written(folder: Path, entries: Sequence[Mapping[str, Any]], thumbnails: Sequence[Thumbnail] = ()) -> Path:
    HtmlReport(folder).surveyed(Survey({"datasets": list(entries)}, lambda: thumbnails))
    return folder / PAGE


def figures(text: str) -> dict[str, str]:
    """The large numbers of a page with one dataset."""
    return dict(re.findall(r'data-figure="(\w+)">([^<]+)<', html.unescape(text)))


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    text = written(tmp_path, [entry()], [thumbnail()]).read_text(encoding="utf-8")
    assert figures(text) == {
        "used": "1,200", "left_out": "8", "buckets": "3", "upscaled": "24", "cropped": "12.3 %", "truncated": "1 %", "copies": "1"
    }  # fmt: skip
    assert "1,200 images of 1,208 files are used, from 1 dataset, in 3 buckets." in text
    steps = "640\u00a0×\u00a0480 → 112\u00a0×\u00a084, cropped at 8, 10"
    for words in ("832\u00a0×\u00a01216", "broken_7.jpg", "a.jpg", "mirrored", steps):
        assert words in text
    assert text.count("data:image/jpeg;base64,") == 1


def test_control_characters_of_file_names_are_escaped_on_the_page(tmp_path: Path) -> None:
    left_out = [{"key": "\x1b[31mred.png", "reason": "unreadable: \x07 & <b>"}]
    page = written(tmp_path, [entry(left_out=left_out)]).read_text(encoding="utf-8")
    assert r"\x1b[31mred.png" in page and r"unreadable: \x07 &amp; &lt;b&gt;" in page
    assert "\x1b" not in page and "\x07" not in page


def test_conditioning_images_have_a_section_that_lists_what_has_no_image() -> None:
    left_out = [{"key": f"{EVIL}_{number}.png", "reason": "condition without an image"} for number in range(3)]
    report = {"datasets": [entry()], "conditions": [{"id": "edges", "found": 11, "used": 8, "left_out": left_out}]}
    text = page(report, [])
    of_images, _, of_conditions = text.partition('data-conditions="edges"')
    assert figures(of_conditions) == {"used": "8", "left_out": "3"} and "files left out of 11" in of_conditions
    assert of_conditions.count("condition without an image") == 1 + 3 and "condition without" not in of_images
    assert "<script" not in text and "&lt;script&gt;" in of_conditions
    assert "data-conditions" not in page({"datasets": [entry()]}, [])


def test_loss_masks_have_their_numbers_and_what_to_check_about_them() -> None:
    counts = [600, 0, 0, 0, 0, 0, 0, 0, 100, 500]
    mask = {"data": "masks", "outside_weight": 0, "coverage": 0.312, "coverages": {"edges": list(COVERAGE_EDGES), "counts": counts}}
    mask |= {"whole": 3, "without_alpha": 0, "dim": 2, "dim_example": "dim.png"}
    left_out = [{"key": "odd.png", "reason": "mask without an image: no image has this name"}]
    report = {"datasets": [entry(mask=mask)], "masks": [{"id": "masks", "found": 9, "used": 8, "left_out": left_out}]}
    text = page(report, [thumbnail()])
    of_images, _, of_masks = text.partition('data-masks="masks"')
    assert figures(of_images)["masked"] == "31.2 %" and figures(of_masks) == {"used": "8", "left_out": "1"} and "Loss masks: " in of_masks
    assert "80 to 90 % white: 100" in of_images and "Dark areas are what the mask leaves black." in of_images
    sentences = list(findings(entry(mask=mask)))
    assert "3 of 1,200 masks are white all over; these images are trained whole." in sentences
    assert any("2 of 1,200 masks are darker than half of white everywhere, such as dim.png" in sentence for sentence in sentences)
    alpha = {**mask, "data": "alpha", "whole": 1_200, "without_alpha": 1_200, "dim": 0}
    sentences = list(findings(entry(mask=alpha)))
    assert "1,200 of 1,200 images have no alpha channel and are trained whole." in sentences
    assert "No mask leaves out anything: every image is trained whole." in sentences
    assert "Dark areas" not in page({"datasets": [entry()]}, [thumbnail()])


def test_what_deserves_a_look_is_said_in_sentences() -> None:
    said = "\n".join(findings(entry()))
    for words in (
        "8 of 1,208 files are left out",
        "24 images (2 %) are smaller than their training size",
        "removes 12.3 % of an image",
        "12 of 1,199 captions (1 %) are longer than the 77 tokens",
        "2 images are exact duplicates",
        "1 bucket has a single image",
    ):
        assert words in said
    flawless = entry(
        left_out=[], upscaled=0, cropped_share=0.01, copies=[], buckets={"64x64": 1_200}, captions={**ENTRY["captions"], "truncated": 0}
    )
    assert list(findings(flawless)) == []


def test_what_nobody_has_read_yet_is_said_to_be_unknown() -> None:
    text = page({"datasets": [entry(copies=[], unread=1_200)]}, [])
    assert figures(text)["copies"] == "unknown"
    assert "1,200 of 1,200 images have not been checked yet" in text and "No two images" not in text
    half = page({"datasets": [entry(unread=600)]}, [])
    assert figures(half)["copies"] == "1" and "found so far" in half


def test_captions_of_which_a_part_was_measured_say_so() -> None:
    captions = {**ENTRY["captions"], "distinct": 900_000}
    assert "1,199 of 900,000, evenly selected" in page({"datasets": [entry(captions=captions)]}, [])
    assert any("checked captions" in sentence for sentence in findings(entry(captions=captions)))


@pytest.mark.parametrize("limit", [8, 77, 225])
@pytest.mark.parametrize("lengths", [[], [2], [76, 77, 78], [77, 5_000], list(range(2, 400))])
def test_bars_are_marked_exactly_where_captions_are_cut_off(limit: int, lengths: list[int]) -> None:
    captions = {
        **ENTRY["captions"],
        "limit": limit,
        "truncated": sum(length > limit for length in lengths),
        "tokens": [[length, 1] for length in lengths],
        "counted": len(lengths),
        "distinct": len(lengths),
    }
    text = page({"datasets": [entry(captions=captions)]}, [])
    marked = re.findall(r'class="bar strong"[^>]*><title>[^:]+: ([\d,]+)<', text)
    assert sum(int(number.replace(",", "")) for number in marked) == captions["truncated"]


@pytest.mark.parametrize(("share", "words"), [(0, "0 %"), (1e-6, "< 0.1 %"), (0.0456, "4.56 %"), (0.99999, "> 99.9 %"), (1, "100 %")])
def test_a_share_is_never_rounded_to_nothing_or_to_all(share: float, words: str) -> None:
    assert percent(share) == words


def test_names_and_captions_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    evil = entry(
        id=EVIL,
        left_out=[{"key": EVIL, "reason": f"unreadable: {EVIL}"}],
        copies=[[EVIL, EVIL]],
        captions={**ENTRY["captions"], "shared": [{"caption": EVIL, "images": 2}]},
    )
    shown = [thumbnail(dataset=EVIL, key=EVIL, caption=EVIL), thumbnail(dataset=EVIL, jpeg=b"", problem=EVIL)]
    text = written(tmp_path, [evil], shown).read_bytes().decode("utf-8")
    assert "<script" not in text and "</script" not in text
    assert text.count("&lt;script&gt;") >= 8
    attributes = re.findall(r'(?:title|alt|data-dataset)="([^"]*)"', text)
    assert sum("console.error" in attribute for attribute in attributes) >= 4  # no quote ends one early


def test_the_page_asks_nothing_of_the_network_and_has_no_script(tmp_path: Path) -> None:
    text = written(tmp_path, [entry()], [thumbnail()]).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|iframe|object)\b|url\(|@import", text)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', text))


def test_a_page_that_shows_the_same_already_is_not_written_again(tmp_path: Path) -> None:
    """As on every start of a run whose data has not changed."""
    path = written(tmp_path, [entry()], [thumbnail()])
    before = path.stat().st_ino
    assert written(tmp_path, [entry()], [thumbnail()]).stat().st_ino == before
    for entries, shown in (([entry(upscaled=25)], [thumbnail()]), ([entry()], [thumbnail(caption="another")]), ([entry()], [])):
        inode = path.stat().st_ino
        assert written(tmp_path, entries, shown).stat().st_ino != inode
    path.write_text("cut off")
    assert "</html>" in written(tmp_path, [entry()]).read_text(encoding="utf-8")


def test_a_page_on_very_many_files_stays_small() -> None:
    many = entry(
        used=1_000_000,
        left_out=[{"key": f"{number:06}.jpg", "reason": "no caption: " + "x" * 500} for number in range(20_000)],
        copies=[[f"{group}/{number}.jpg" for number in range(1_000)] for group in range(1_000)],
        buckets={f"{64 * width}x{64 * height}": 9 for width in range(1, 60) for height in range(1, 60)},
    )
    text = page({"datasets": [many]}, [])
    assert len(text) < 2_000_000
    assert f"The first {MOST_LEFT_OUT:,} of 20,000 files; dataset_report.json lists all of them." in text
    assert "000999.jpg" in text and "001000.jpg" not in text


# -- in a real browser --------------------------------------------------------------------------------------------------------

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
# A frame of any width around the page, and what can be measured of it from outside: scripts do not run in the page itself.
PROBE = """<!DOCTYPE html><iframe id="frame" style="width: {width}px; height: 900px; border: 0" src="{page}"></iframe><pre id="seen"></pre>
<script>
onload = () => {{
  const page = document.getElementById("frame").contentDocument;
  const seen = {{
    content: page.documentElement.scrollWidth,
    figures: Object.fromEntries([...page.querySelectorAll("[data-figure]")].map((each) => [each.dataset.figure, each.textContent])),
    pictures: [...page.images].map((image) => [image.naturalWidth, image.naturalHeight]),
    ids: [...page.querySelectorAll("section h2")].map((each) => each.textContent),
    bars: page.querySelectorAll("rect.bar").length,
    scripts: page.scripts.length,
  }};
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script>"""


def browse(folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """What chromium prints, and what it has to complain of on its console."""
    assert CHROMIUM is not None
    usual = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    ended = subprocess.run(
        [CHROMIUM, *usual, f"--user-data-dir={folder / 'profile'}", *arguments], capture_output=True, timeout=120, check=True
    )
    return ended.stdout.decode(), [line for line in ended.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1360])
def test_a_browser_shows_the_page_without_complaint_at_any_width(tmp_path: Path, width: int) -> None:
    name = EVIL.replace("\udcff", "ÿ")  # what is not UTF-8 is shown as an escape
    entries = [entry(id=name), entry(id="x" * 200, left_out=[{"key": "y" * 900 + ".jpg", "reason": "unreadable: " + "z" * 900}])]
    shown = [thumbnail(dataset=name, key=EVIL, caption=EVIL * 20), thumbnail(dataset=name, jpeg=b"", problem="unreadable: " + "w" * 300)]
    path = written(tmp_path, entries, shown)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, page=path.as_uri()), encoding="utf-8")
    printed, complaints = browse(tmp_path, "--window-size=1400,1000", "--dump-dom", probe.as_uri())
    assert complaints == []
    found = re.search(r'<pre id="seen">(.*)</pre>', printed)
    assert found, printed[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["content"] <= width  # nothing sticks out to the side
    assert seen["figures"]["used"] == "1,200" and seen["figures"]["upscaled"] == "24"
    assert seen["ids"] == [name, "x" * 200]
    assert seen["pictures"] == [[96, 64]] and seen["scripts"] == 0
    assert seen["bars"] == 2 * (2 + 3 + 4)


@in_a_browser
@pytest.mark.slow
def test_a_browser_complains_where_there_is_something_to_complain_of(tmp_path: Path) -> None:
    """Or the absence of complaints would say nothing."""
    path = written(tmp_path, [entry()])
    broken = path.read_text(encoding="utf-8").replace("</main>", "<script>1</script></main>")
    path.write_text(broken, encoding="utf-8")
    _, complaints = browse(tmp_path, "--dump-dom", path.as_uri())
    assert any("Content Security Policy" in line for line in complaints)


@in_a_browser
@pytest.mark.slow
def test_the_page_is_light_or_dark_as_its_reader_likes(tmp_path: Path) -> None:
    path = written(tmp_path, [entry()])
    corners = []
    for scheme in ("0", "1"):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        browse(tmp_path, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,600", f"--screenshot={shot}", path.as_uri())
        with Image.open(shot) as image:
            corners.append(image.convert("L").getpixel((2, 2)))
    dark, light = corners
    assert isinstance(dark, int) and isinstance(light, int) and dark < 40 and light > 220
