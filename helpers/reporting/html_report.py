"""The dataset report as a page to look at: one file without scripts that asks nothing of the network.

Everything it shows comes from dataset_report.json but for the thumbnails. Lists are cut to what a person reads, with their full length
and the file that has them all, so a page stays small whatever the data.
"""

from __future__ import annotations

import base64
import bisect
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.protocols import Reporter
from helpers.storage.atomic import write_file

if TYPE_CHECKING:
    from helpers.data.report.survey import Survey, Thumbnail

PAGE = "dataset_report.html"
TEMPLATE = Path(__file__).with_name("dataset_report.html.j2")
MOST_LEFT_OUT, MOST_SHAPES, MOST_GROUPS, MOST_COPIES = 1_000, 60, 100, 8  # rows of a data set's lists; keys in a group of copies
MOST_CHARACTERS = 600  # of a caption or a file's name
MOST_BARS = 32
CHART_WIDTH, CHART_HEIGHT, CHART_FOOT = 320, 110, 20  # units of the drawing; the foot holds the labels
PERCEPTIBLE_CROP = 0.1  # share of a picture that is cut away, from which on the page mentions it


class HtmlReport(Reporter):
    """Writes OUTPUT_DIR/dataset_report.html, unless the page that is there shows the same already."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def surveyed(self, survey: Survey) -> None:
        thumbnails = survey.thumbnails()
        mark = _mark(survey.report, thumbnails)
        if mark not in _end(self.output_dir / PAGE):
            text = page(survey.report, thumbnails) + mark
            write_file(self.output_dir / PAGE, text.encode("utf-8", "backslashreplace"))


def _mark(report: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> str:
    """A comment that names all that a page is made from, this module included."""
    digest = sha256(json.dumps([report, repr(thumbnails)]).encode())
    for path in (TEMPLATE, Path(__file__)):
        digest.update(path.read_bytes())
    return f"<!-- {digest.hexdigest()} -->\n"


def _end(path: Path) -> str:
    """The last bytes of a page; of none, nothing."""
    try:
        with path.open("rb") as stream:
            stream.seek(-min(128, path.stat().st_size), os.SEEK_END)
            return stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


@dataclass(frozen=True)
class Bar:
    """One bar of a chart, in its units; `strong` marks what the page speaks of."""

    x: float
    y: float
    width: float
    height: float
    tip: str
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """A histogram to be drawn as SVG."""

    title: str
    bars: Sequence[Bar]
    labels: Sequence[tuple[float, str, str]]  # x, text, anchor
    line: float | None = None  # x of a limit
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """A list as the page has it: its beginning, and how many there are."""

    items: Sequence[Any]
    total: int

    @property
    def more(self) -> int:
        return self.total - len(self.items)


@dataclass(frozen=True)
class Section:
    """What the page says of one data set."""

    entry: Mapping[str, Any]
    findings: Sequence[str]
    kinds: Sequence[tuple[str, int]]
    left_out: Shown
    shapes: Shown
    copies: Shown
    shared: Shown
    charts: Sequence[Chart]
    sheet: Sequence[Picture]


@dataclass(frozen=True)
class ConditionsSection:
    """What the page says of one data set of conditions."""

    entry: Mapping[str, Any]
    kinds: Sequence[tuple[str, int]]
    left_out: Shown


@dataclass(frozen=True)
class Picture:
    """A thumbnail as the page has it."""

    name: str
    caption: str
    source: str  # data URI; "" where there is none
    shape: str
    steps: str  # from the file to the shape
    problem: str
    marks: Sequence[str] = field(default_factory=tuple)


def page(report: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> str:
    """The page for the content of dataset_report.json and some thumbnails, in any order of data sets."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = "{:,}".format
    environment.filters["percent"] = percent
    environment.filters["short"] = short
    environment.filters["sizes"] = lambda text: text.replace("x", "\u00a0×\u00a0")
    sections = [_section(entry, [each for each in thumbnails if each.dataset == entry["id"]]) for entry in report["datasets"]]
    conditions = [
        ConditionsSection(entry, _kinds(entry), _shown(entry["left_out"], MOST_LEFT_OUT)) for entry in report.get("conditions", ())
    ]
    shapes = {shape for entry in report["datasets"] for shape in entry["buckets"]}
    totals = {name: sum(entry[name] for entry in report["datasets"]) for name in ("found", "used")}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        sections=sections, conditions=conditions, shapes=len(shapes), chart_width=CHART_WIDTH, chart_height=CHART_HEIGHT, **totals
    )


def _section(entry: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> Section:
    buckets = sorted(entry["buckets"].items(), key=lambda bucket: -bucket[1])
    largest = buckets[0][1] if buckets else 1
    shapes = [{"shape": shape, "images": images, "bar": images / largest, **_outline(shape)} for shape, images in buckets]
    copies = [Shown(keys[:MOST_COPIES], len(keys)) for keys in entry["copies"]]
    shared = entry["captions"]["shared"]
    return Section(
        entry,
        list(findings(entry)),
        _kinds(entry),
        _shown(entry["left_out"], MOST_LEFT_OUT),
        _shown(shapes, MOST_SHAPES),
        _shown(copies, MOST_GROUPS),
        _shown(shared, MOST_GROUPS),
        [_sizes_chart(entry["sizes"]), _aspects_chart(entry["aspects"]), _captions_chart(entry["captions"])],
        [_picture(each) for each in thumbnails],
    )


def _kinds(entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Why files are left out, with the number of files, the most frequent reason first."""
    return Counter(item["reason"].partition(":")[0] for item in entry["left_out"]).most_common()


def findings(entry: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what is worth a look before training on a data set."""
    used, captions, copies = entry["used"], entry["captions"], entry["copies"]
    if entry["left_out"]:
        yield f"{len(entry['left_out']):,} of {entry['found']:,} files are left out; each is listed with its reason."
    if entry["upscaled"]:
        share = percent(entry["upscaled"] / used)
        yield f"{entry['upscaled']:,} pictures ({share}) have fewer pixels than they are trained at, and are enlarged."
    if entry["cropped_share"] >= PERCEPTIBLE_CROP:
        yield f"The cut removes {percent(entry['cropped_share'])} of a picture on average; look whether heads and feet are still there."
    if captions["truncated"]:
        measured = "captions" if captions["counted"] == captions["distinct"] else "captions looked at"
        share = percent(captions["truncated"] / captions["counted"])
        yield (
            f"{captions['truncated']:,} of {captions['counted']:,} {measured} ({share}) are longer than the {captions['limit']} tokens"
            " that the text encoders read; what comes after is not seen."
        )
    if copies:
        surplus = sum(len(keys) - 1 for keys in copies)
        yield f"{surplus:,} picture{'s are' if surplus > 1 else ' is'} an exact copy of another one."
    if entry["unread"]:
        yield f"Whether {entry['unread']:,} pictures are copies is not known yet: their bytes are read when they are first encoded."
    lonely = sum(images == 1 for images in entry["buckets"].values())
    if lonely:
        yield f"{lonely:,} shape{'s have' if lonely > 1 else ' has'} a single picture, which makes a batch of its own in every epoch."


def percent(share: float) -> str:
    """A share from 0 to 1 in words: never 0 % for what is there, never 100 % for what is not all."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.3g} %"


def short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _shown(items: Sequence[Any], most: int) -> Shown:
    return Shown(items[:most], len(items))


def _outline(shape: str) -> dict[str, float]:
    """Width and height of a small rectangle of a shape's aspect, at most 18 units."""
    width, height = map(int, shape.split("x"))
    return {"width": round(18 * width / max(width, height), 1), "height": round(18 * height / max(width, height), 1)}


def _picture(thumbnail: Thumbnail) -> Picture:
    geometry = thumbnail.geometry
    marks = ["enlarged"] * thumbnail.upscaled + ["mirrored"] * geometry.flip
    source = "data:image/jpeg;base64," + base64.b64encode(thumbnail.jpeg).decode() if thumbnail.jpeg else ""
    steps = f"{geometry.original} → {geometry.resized}" if geometry.original != geometry.resized else str(geometry.original)
    if geometry.resized != geometry.target:
        steps += f", cut from {geometry.left}, {geometry.top}"
    return Picture(thumbnail.key, thumbnail.caption, source, str(geometry.target), steps, thumbnail.problem, marks)


# -- charts -----------------------------------------------------------------------------------------------------------------


def _sizes_chart(histogram: Mapping[str, Any]) -> Chart:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"{low:g} to {high:g} megapixels" for low, high in zip(edges, edges[1:], strict=False)]
    labels = [(index, f"{edges[index]:g}", "middle") for index in range(1, len(counts))]
    return _chart("Sizes of the files, megapixels", counts, names, labels)


def _aspects_chart(histogram: Mapping[str, Any]) -> Chart:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"width / height {low:.2f} to {high:.2f}" for low, high in zip(edges, edges[1:], strict=False)]
    labels = [(_place(edges, aspect), name, "middle") for aspect, name in ((0.25, "1:4"), (0.5, "1:2"), (1, "1:1"), (2, "2:1"), (4, "4:1"))]
    return _chart("Aspects of the files, width : height", counts, names, labels)


def _place(edges: Sequence[float], value: float) -> float:
    """Where a value lies on an axis whose unit is a bin and whose bins are of equal width in logarithms."""
    index = min(max(bisect.bisect_right(edges, value) - 1, 0), len(edges) - 2)
    return index + math.log(value / edges[index]) / math.log(edges[index + 1] / edges[index])


def _captions_chart(captions: Mapping[str, Any]) -> Chart:
    tokens, read = captions["tokens"], captions["limit"]
    longest = max((length for length, _ in tokens), default=0)
    limit = longest if read is None else read
    width = _round_width(max(longest, limit + 1) / MOST_BARS)
    # Bins are laid so that one begins with the first length that is cut off; the bin at 0 may be the narrower for it.
    starts = sorted({0, *range((limit + 1) % width, max(longest, limit + 1) + 1, width)})
    counts = [0] * len(starts)
    for length, count in tokens:
        counts[bisect.bisect_right(starts, length) - 1] += count
    last = [start - 1 for start in (*starts[1:], starts[-1] + width)]
    names = [f"{start} to {end} tokens" if end > start else f"{start} tokens" for start, end in zip(starts, last, strict=True)]
    cut_off = starts.index(limit + 1)
    told = "all are read" if read is None else f"{read} are read"
    labels = [(0.0, "0", "start"), (float(cut_off), told, "start" if cut_off < len(counts) / 2 else "end")]
    if cut_off < 0.6 * len(counts):
        labels.append((float(len(counts)), f"{longest:,}", "end"))
    note = "" if captions["counted"] == captions["distinct"] else f"{captions['counted']:,} of {captions['distinct']:,}, spread evenly"
    return _chart("Captions, tokens", counts, names, labels, line=cut_off, note=note)


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below `least`."""
    return next(step * 10**power for power in range(12) for step in (1, 2, 5) if step * 10**power >= least)


def _chart(
    title: str,
    counts: Sequence[int],
    names: Sequence[str],
    labels: Sequence[tuple[float, str, str]],
    line: float | None = None,
    note: str = "",
) -> Chart:
    """`labels` and `line` are placed in bins: 0 is the left end of the first bar, 1 the left end of the second.

    Bars beyond the line are the strong ones.
    """
    pitch = CHART_WIDTH / len(counts)
    tallest = max(counts, default=0) or 1
    room = CHART_HEIGHT - CHART_FOOT - 4
    bars = []
    for index, (count, name) in enumerate(zip(counts, names, strict=True)):
        height = max(room * count / tallest, 1.5) if count else 0  # a single one among thousands is to be seen
        strong = line is not None and index >= line
        top = CHART_HEIGHT - CHART_FOOT - height
        bars.append(
            Bar(round(index * pitch + 0.75, 2), round(top, 2), round(pitch - 1.5, 2), round(height, 2), f"{name}: {count:,}", strong)
        )
    places = [(round(at * pitch, 2), text, anchor) for at, text, anchor in labels]
    return Chart(title, bars, places, None if line is None else round(line * pitch, 2), note)
