"""The dataset report as an HTML page: one file without scripts that loads nothing from the network.

Everything except the thumbnails comes from dataset_report.json. Long lists are truncated, with their full length and a reference to
dataset_report.json, so the page stays small for any dataset.
"""

from __future__ import annotations

import base64
import bisect
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import visible
from helpers.protocols import Reporter
from helpers.storage.atomic import write_file

if TYPE_CHECKING:
    import jinja2

    from helpers.data.report.survey import Survey, Thumbnail

PAGE = "dataset_report.html"
TEMPLATE = Path(__file__).with_name("dataset_report.html.j2")
MOST_LEFT_OUT, MOST_BUCKETS, MOST_GROUPS, MOST_COPIES = 1_000, 60, 100, 8  # rows of a dataset's lists; files in a group of duplicates
MOST_CHARACTERS = 600  # of a caption or a file name
MOST_BARS = 32
CHART_WIDTH, CHART_HEIGHT, CHART_FOOT = 320, 110, 20  # in SVG units; the foot holds the axis labels
PERCEPTIBLE_CROP = 0.1  # the page mentions the crop if it removes at least this share of an image


class HtmlReport(Reporter):
    """Writes OUTPUT_DIR/dataset_report.html, unless the existing page is up to date."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def surveyed(self, survey: Survey) -> None:
        thumbnails = survey.thumbnails()
        mark = _mark(survey.report, thumbnails)
        if mark not in _end(self.output_dir / PAGE):
            text = page(survey.report, thumbnails) + mark
            write_file(self.output_dir / PAGE, text.encode("utf-8", "backslashreplace"))


def _mark(report: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> str:
    """An HTML comment with a hash of everything that the page is made from, including this module."""
    digest = sha256(json.dumps([report, repr(thumbnails)]).encode())
    for path in (TEMPLATE, Path(__file__)):
        digest.update(path.read_bytes())
    return f"<!-- {digest.hexdigest()} -->\n"


def _end(path: Path) -> str:
    """The last 128 bytes of a file; "" if there is no file."""
    try:
        with path.open("rb") as stream:
            stream.seek(-min(128, path.stat().st_size), os.SEEK_END)
            return stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


@dataclass(frozen=True)
class Bar:
    """One bar of a chart, in SVG units. `strong` bars are highlighted."""

    x: float
    y: float
    width: float
    height: float
    tip: str
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """A histogram, drawn as SVG."""

    title: str
    bars: Sequence[Bar]
    labels: Sequence[tuple[float, str, str]]  # x, text, anchor
    line: float | None = None  # x of a vertical line at a limit
    note: str = ""


@dataclass(frozen=True)
class Truncated:
    """The beginning of a list, and the length of the full list."""

    items: Sequence[Any]
    total: int

    @property
    def more(self) -> int:
        return self.total - len(self.items)


@dataclass(frozen=True)
class Section:
    """The page's section about one image dataset."""

    entry: Mapping[str, Any]
    findings: Sequence[str]
    kinds: Sequence[tuple[str, int]]
    left_out: Truncated
    buckets: Truncated
    copies: Truncated
    shared: Truncated
    charts: Sequence[Chart]
    sheet: Sequence[SheetImage]


@dataclass(frozen=True)
class CompanionsSection:
    """The page's section about one dataset of conditioning images or masks."""

    name: str  # "conditions" or "masks", as in dataset_report.json
    title: str
    entry: Mapping[str, Any]
    kinds: Sequence[tuple[str, int]]
    left_out: Truncated


@dataclass(frozen=True)
class SheetImage:
    """A thumbnail on the page."""

    name: str
    caption: str
    source: str  # data URI; "" if the image cannot be shown
    size: str  # it is trained at this size
    steps: str  # from the file's size to the training size
    problem: str
    marks: Sequence[str] = field(default_factory=tuple)


def page(report: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> str:
    """The HTML page for the content of dataset_report.json and the thumbnails of its datasets, in any order."""
    sections = [_section(entry, [each for each in thumbnails if each.dataset == entry["id"]]) for entry in report["datasets"]]
    companions = [
        CompanionsSection(name, title, entry, _kinds(entry), _truncated(entry["left_out"], MOST_LEFT_OUT))
        for name, title in (("conditions", "Conditioning images"), ("masks", "Loss masks"))
        for entry in report.get(name, ())
    ]
    buckets = sum(len(entry["buckets"]) for entry in report["datasets"])
    totals = {name: sum(entry[name] for entry in report["datasets"]) for name in ("found", "used")}
    return _template().render(
        sections=sections, companions=companions, buckets=buckets, chart_width=CHART_WIDTH, chart_height=CHART_HEIGHT, **totals
    )


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters["count"] = "{:,}".format
    environment.filters["percent"] = percent
    environment.filters["short"] = short
    environment.filters["sizes"] = lambda text: text.replace("x", "\u00a0×\u00a0")
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _section(entry: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> Section:
    buckets = sorted(entry["buckets"].items(), key=lambda bucket: -bucket[1])
    largest = buckets[0][1] if buckets else 1
    rows = [{"size": size, "images": images, "bar": images / largest, **_outline(size)} for size, images in buckets]
    copies = [Truncated(keys[:MOST_COPIES], len(keys)) for keys in entry["copies"]]
    shared = entry["captions"]["shared"]
    return Section(
        entry,
        list(findings(entry)),
        _kinds(entry),
        _truncated(entry["left_out"], MOST_LEFT_OUT),
        _truncated(rows, MOST_BUCKETS),
        _truncated(copies, MOST_GROUPS),
        _truncated(shared, MOST_GROUPS),
        [
            _sizes_chart(entry["sizes"]),
            _aspects_chart(entry["aspects"]),
            _captions_chart(entry["captions"]),
            *([_masks_chart(entry["mask"]["coverages"])] if "mask" in entry else []),
        ],
        [_sheet_image(each) for each in thumbnails],
    )


def _kinds(entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The reasons why files are left out, with the number of files; the most frequent reason first."""
    return Counter(item["reason"].partition(":")[0] for item in entry["left_out"]).most_common()


def _visible(value: object) -> object:
    """What a template prints, with control characters of file names and captions as escapes. The page isolates bidirectional text."""
    return visible(value, keep_marks=True) if type(value) is str else value


def findings(entry: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about what to check before training on a dataset."""
    used, captions, copies = entry["used"], entry["captions"], entry["copies"]
    if entry["left_out"]:
        yield f"{len(entry['left_out']):,} of {entry['found']:,} files are left out; each is listed with the reason."
    if entry["upscaled"]:
        share = percent(entry["upscaled"] / used)
        yield f"{entry['upscaled']:,} images ({share}) are smaller than their training size and are upscaled."
    if entry["cropped_share"] >= PERCEPTIBLE_CROP:
        yield f"The crop removes {percent(entry['cropped_share'])} of an image on average; check whether heads and feet are cut off."
    if mask := entry.get("mask"):
        yield from _mask_findings(mask, used)
    if captions["truncated"]:
        measured = "captions" if captions["counted"] == captions["distinct"] else "checked captions"
        share = percent(captions["truncated"] / captions["counted"])
        yield (
            f"{captions['truncated']:,} of {captions['counted']:,} {measured} ({share}) are longer than the {captions['limit']} tokens"
            " that the text encoders read; the rest is ignored."
        )
    if copies:
        surplus = sum(len(keys) - 1 for keys in copies)
        yield f"{surplus:,} image{'s are exact duplicates' if surplus > 1 else ' is an exact duplicate'} of another image."
    if entry["unread"]:
        yield f"{entry['unread']:,} images have not been checked for duplicates yet: their bytes are read when they are first encoded."
    lonely = sum(images == 1 for images in entry["buckets"].values())
    if lonely:
        yield f"{lonely:,} bucket{'s have' if lonely > 1 else ' has'} a single image, which is a batch of its own in every epoch."


def _mask_findings(mask: Mapping[str, Any], used: int) -> Iterator[str]:
    if mask["without_alpha"]:
        yield f"{mask['without_alpha']:,} of {used:,} images have no alpha channel and are trained whole."
    if mask["whole"] == used:
        yield "No mask leaves out anything: every image is trained whole."
    elif mask["whole"] > mask["without_alpha"]:
        yield f"{mask['whole'] - mask['without_alpha']:,} of {used:,} masks are white all over; these images are trained whole."
    if mask["dim"]:
        such_as = f"darker than half of white everywhere, such as {short(mask['dim_example'])}"
        yield f"{mask['dim']:,} of {used:,} masks are {such_as}; check whether their white is 255."


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage. Only 0 becomes 0 %, and only 1 becomes 100 %."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.3g} %"


def short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _truncated(items: Sequence[Any], most: int) -> Truncated:
    return Truncated(items[:most], len(items))


def _outline(size: str) -> dict[str, float]:
    """Width and height of a small rectangle with the aspect ratio of a size such as 832x1216, at most 18 SVG units."""
    width, height = map(int, size.split("x"))
    return {"width": round(18 * width / max(width, height), 1), "height": round(18 * height / max(width, height), 1)}


def _sheet_image(thumbnail: Thumbnail) -> SheetImage:
    geometry = thumbnail.geometry
    marks = ["upscaled"] * thumbnail.upscaled + ["mirrored"] * geometry.flip
    source = "data:image/jpeg;base64," + base64.b64encode(thumbnail.jpeg).decode() if thumbnail.jpeg else ""
    steps = f"{geometry.original} → {geometry.resized}" if geometry.original != geometry.resized else str(geometry.original)
    if geometry.resized != geometry.target:
        steps += f", cropped at {geometry.left}, {geometry.top}"
    return SheetImage(thumbnail.key, thumbnail.caption, source, str(geometry.target), steps, thumbnail.problem, marks)


# -- charts -----------------------------------------------------------------------------------------------------------------


def _sizes_chart(histogram: Mapping[str, Any]) -> Chart:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"{low:g} to {high:g} megapixels" for low, high in zip(edges, edges[1:], strict=False)]
    labels = [(index, f"{edges[index]:g}", "middle") for index in range(1, len(counts))]
    return _chart("Image sizes in megapixels", counts, names, labels)


def _aspects_chart(histogram: Mapping[str, Any]) -> Chart:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"width / height {low:.2f} to {high:.2f}" for low, high in zip(edges, edges[1:], strict=False)]
    labels = [(_place(edges, aspect), name, "middle") for aspect, name in ((0.25, "1:4"), (0.5, "1:2"), (1, "1:1"), (2, "2:1"), (4, "4:1"))]
    return _chart("Aspect ratios, width : height", counts, names, labels)


def _masks_chart(histogram: Mapping[str, Any]) -> Chart:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"{100 * low:.0f} to {100 * high:.0f} % white" for low, high in zip(edges, edges[1:], strict=False)]
    labels = [(0, "0 %", "start"), (len(counts) / 2, "50 %", "middle"), (len(counts), "100 %", "end")]
    return _chart("Share of white in masks", counts, names, labels)


def _place(edges: Sequence[float], value: float) -> float:
    """Position of a value on the axis of a logarithmic histogram, in bins."""
    index = min(max(bisect.bisect_right(edges, value) - 1, 0), len(edges) - 2)
    return index + math.log(value / edges[index]) / math.log(edges[index + 1] / edges[index])


def _captions_chart(captions: Mapping[str, Any]) -> Chart:
    tokens, read = captions["tokens"], captions["limit"]
    longest = max((length for length, _ in tokens), default=0)
    limit = longest if read is None else read
    width = _round_width(max(longest, limit + 1) / MOST_BARS)
    # One bin begins at the first length that is cut off, so the bin at 0 may be narrower.
    starts = sorted({0, *range((limit + 1) % width, max(longest, limit + 1) + 1, width)})
    counts = [0] * len(starts)
    for length, count in tokens:
        counts[bisect.bisect_right(starts, length) - 1] += count
    last = [start - 1 for start in (*starts[1:], starts[-1] + width)]
    names = [f"{start} to {end} tokens" if end > start else f"{start} tokens" for start, end in zip(starts, last, strict=True)]
    cut_off = starts.index(limit + 1)
    limit_label = "all are read" if read is None else f"{read} are read"
    labels = [(0.0, "0", "start"), (float(cut_off), limit_label, "start" if cut_off < len(counts) / 2 else "end")]
    if cut_off < 0.6 * len(counts):
        labels.append((float(len(counts)), f"{longest:,}", "end"))
    note = "" if captions["counted"] == captions["distinct"] else f"{captions['counted']:,} of {captions['distinct']:,}, evenly selected"
    return _chart("Caption lengths in tokens", counts, names, labels, line=cut_off, note=note)


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is at least `least`."""
    return next(step * 10**power for power in range(12) for step in (1, 2, 5) if step * 10**power >= least)


def _chart(
    title: str,
    counts: Sequence[int],
    names: Sequence[str],
    labels: Sequence[tuple[float, str, str]],
    line: float | None = None,
    note: str = "",
) -> Chart:
    """Positions of `labels` and `line` are in bins: 0 is the left edge of the first bar, 1 that of the second.

    Bars to the right of the line are highlighted.
    """
    pitch = CHART_WIDTH / len(counts)
    tallest = max(counts, default=0) or 1
    room = CHART_HEIGHT - CHART_FOOT - 4
    bars = []
    for index, (count, name) in enumerate(zip(counts, names, strict=True)):
        height = max(room * count / tallest, 1.5) if count else 0  # a count of 1 among thousands stays visible
        strong = line is not None and index >= line
        top = CHART_HEIGHT - CHART_FOOT - height
        bars.append(
            Bar(round(index * pitch + 0.75, 2), round(top, 2), round(pitch - 1.5, 2), round(height, 2), f"{name}: {count:,}", strong)
        )
    places = [(round(at * pitch, 2), text, anchor) for at, text, anchor in labels]
    return Chart(title, bars, places, None if line is None else round(line * pitch, 2), note)
