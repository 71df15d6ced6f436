"""Tables of captions and sizes beside images: Parquet, JSON lines (or one JSON list) and CSV, read row by row in bounded memory."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from helpers.config.suggest import did_you_mean
from helpers.data.captions import MAX_CAPTION_BYTES, clean
from helpers.data.images import MAX_PIXELS
from helpers.data.sample import Size
from helpers.errors import DataError

BLOCK = 8192  # rows at once
_SHOWN_COLUMNS = 20  # named in a message


@dataclass(frozen=True)
class TableRule:
    """Where a table is and what is taken from it.

    `path` is a key of the data set's source, or an absolute path on this machine. Columns that are None are not read; width and height
    come together, in pixels of the picture as shown.
    """

    path: str
    format: str  # parquet, jsonl or csv
    filename_column: str = "id"
    includes_extension: bool | None = None  # whether names end as the files' do; None: they may or may not
    caption_column: str | None = None
    fallback_caption_column: str | None = None  # where the caption is missing
    width_column: str | None = None
    height_column: str | None = None
    lists: bool = False  # whether a caption may be a list of captions

    @property
    def columns(self) -> list[str]:
        """Every column that is read, each once."""
        wanted = (self.filename_column, self.width_column, self.height_column, self.caption_column, self.fallback_caption_column)
        return list(dict.fromkeys(name for name in wanted if name is not None))


class Row(NamedTuple):
    """One row, judged: values that can be used, or the reason why the image is left out, as "kind: detail"."""

    name: str | None  # the image's, relative to the data set's root; None where the row has none
    is_number: bool  # the name was a number, and leading zeros of the files' names do not count
    width: int | None
    height: int | None
    size_problem: str | None
    captions: str | None  # a JSON list of texts, at least one
    caption_problem: str | None


def read_rows(stream: BinaryIO, rule: TableRule) -> Iterator[list[Row]]:
    """The rows of a table in blocks, in the table's order.

    DataError when it is damaged, of another format or lacks a column.
    """
    if not stream.seekable():
        stream = io.BytesIO(stream.read())
    read = {"parquet": _parquet, "jsonl": _json, "csv": _csv}[rule.format]
    values = read(stream, rule)
    while block := list(itertools.islice(values, BLOCK)):
        yield [_judged(row, rule) for row in block]


# Formats: each gives a row's values by the names of `rule.columns`.


def _parquet(stream: BinaryIO, rule: TableRule) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        _require_columns(file.schema_arrow.names, rule)
        for batch in file.iter_batches(BLOCK, columns=rule.columns):
            values = [batch.column(name).to_pylist() for name in rule.columns]
            for row in zip(*values, strict=True):
                yield dict(zip(rule.columns, row, strict=True))
    except pyarrow.ArrowException as error:
        raise DataError(f"{rule.path} is not a Parquet table, or damaged: {' '.join(str(error).split())[:200]}.") from error


def _json(stream: BinaryIO, rule: TableRule) -> Iterator[dict[str, Any]]:
    """JSON lines, or one list of objects. A column that no row has is missing; one that some rows lack is empty there."""
    seen: set[str] = set()
    for place, row in _json_objects(stream, rule):
        if not isinstance(row, dict):
            raise DataError(f"{rule.path}, {place}: {json.dumps(row)[:40]} is not an object with a row's columns.")
        seen.update(row)
        yield row
    if seen:
        _require_columns(sorted(seen), rule)


def _json_objects(stream: BinaryIO, rule: TableRule) -> Iterator[tuple[str, Any]]:
    lines = (line for line in enumerate(stream, start=1) if line[1].strip(b"\xef\xbb\xbf \t\r\n"))
    first = next(lines, None)
    if first is not None and first[1].lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        stream.seek(0)
        rows = _parsed(stream.read(), rule.path)
        yield from ((f"element {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in itertools.chain([] if first is None else [first], lines):
        yield f"line {number}", _parsed(line, f"{rule.path}, line {number}")


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8; save it as UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}.") from None


def _csv(stream: BinaryIO, rule: TableRule) -> Iterator[dict[str, Any]]:
    """CSV as RFC 4180 has it, with a heading; tabs in place of commas where the name ends in .tsv."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter="\t" if rule.path.lower().endswith(".tsv") else ",", strict=True)
    try:
        heading = next(reader, [])
        _require_columns(heading, rule)
        places = [(name, heading.index(name)) for name in rule.columns]
        for row in reader:
            if row and len(row) != len(heading):
                raise DataError(
                    f"{rule.path}, line {reader.line_num}: {len(row)} values under {len(heading)} columns;"
                    " a value with a comma stands in double quotes."
                )
            if row:
                yield {name: row[place] for name, place in places}
    except csv.Error as error:
        raise DataError(f"{rule.path}, line {reader.line_num}: is not CSV: {error}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{rule.path}: is not UTF-8 after line {reader.line_num}; save it as UTF-8.") from None


def _require_columns(found: Sequence[str], rule: TableRule) -> None:
    """DataError unless each column that is read is there exactly once."""
    for name in rule.columns:
        if name not in found:
            named = ", ".join(found[:_SHOWN_COLUMNS]) + (", ..." if len(found) > _SHOWN_COLUMNS else "")
            raise DataError(f"{rule.path} has no column {name!r}{did_you_mean(name, found)}; it has {named or 'none'}.")
        if found.count(name) > 1:
            raise DataError(f"{rule.path} has {found.count(name)} columns {name!r}; rename all but one.")


# Rows.


def _judged(values: dict[str, Any], rule: TableRule) -> Row:
    name = values.get(rule.filename_column)
    is_number = isinstance(name, int) and not isinstance(name, bool)
    width = height = size_problem = captions = caption_problem = None
    if rule.width_column is not None and rule.height_column is not None:
        width, height, size_problem = _size(values.get(rule.width_column), values.get(rule.height_column), rule)
    if rule.caption_column is not None:
        captions, caption_problem = _captions(values, rule)
    return Row(_name(name), is_number, width, height, size_problem, captions, caption_problem)


def _name(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not _is_unicode(value):
        return None
    return value.removeprefix("./") or None


def _size(width: Any, height: Any, rule: TableRule) -> tuple[int | None, int | None, str | None]:
    numbers = [_whole(value) for value in (width, height)]
    if numbers[0] is None or numbers[1] is None:
        missing = next(name for name, number in zip((rule.width_column, rule.height_column), numbers, strict=True) if number is None)
        value = _shown(width if numbers[0] is None else height)
        return None, None, f"no size: the column {missing} of {rule.path} says {value} for it"
    size = Size(numbers[0], numbers[1])
    if size.area > MAX_PIXELS:
        return None, None, f"too large: {size}, more than {MAX_PIXELS / 1e6:g} megapixels"
    return size.width, size.height, None


def _whole(value: Any) -> int | None:
    """A whole number of pixels, at least 1, from what a column of numbers or texts says; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and number >= 1 else None


def _shown(value: Any) -> str:
    """A value in a message, cut to a readable length."""
    return "nothing" if value is None or value == "" or value != value else repr(value)[:40]


def _captions(values: dict[str, Any], rule: TableRule) -> tuple[str | None, str | None]:
    """The captions of a row as a JSON list, or what is wrong with them."""
    names = [name for name in (rule.caption_column, rule.fallback_caption_column) if name is not None]
    for name in names:
        value = values.get(name)
        if isinstance(value, list) and not rule.lists:
            raise DataError(f"{rule.path}: the column {name!r} holds lists of captions; set multiple_captions to true to use them.")
        texts = value if isinstance(value, list) else [value]
        texts = [text for text in texts if text is not None and text == text]  # NaN is how pandas writes that there is none
        if not all(isinstance(text, str) for text in texts):
            return None, f"caption is not text: the column {name} of {rule.path} says {_shown(value)} for it"
        cleaned = [text for text in map(clean, texts) if text]
        if not all(map(_is_unicode, cleaned)):
            return None, f"caption is not UTF-8: the column {name} of {rule.path} has half of a character pair for it"
        length = sum(map(len, cleaned))
        if length > MAX_CAPTION_BYTES:
            return None, f"caption too long: the column {name} of {rule.path} has {length:,} characters for it"
        if cleaned:
            return json.dumps(cleaned, ensure_ascii=False), None
    return None, f"empty caption: {' and '.join(names)} of {rule.path} {'say' if len(names) > 1 else 'says'} nothing of it"


def _is_unicode(text: str) -> bool:
    """Whether a text can be stored: JSON can write halves of surrogate pairs, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
