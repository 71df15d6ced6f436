"""Tables with captions and image sizes: Parquet, JSON lines (or one JSON list) and CSV. Read in blocks, so memory is bounded."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from helpers.config.suggest import did_you_mean
from helpers.data.base.images import MAX_JPEG_PIXELS
from helpers.data.base.sample import Size
from helpers.data.catalogue.captions import MAX_CAPTION_BYTES, clean, json_list
from helpers.errors import DataError, quoted
from helpers.foreign_json import parse_json

BLOCK = 8192  # rows in memory at a time
_SHOWN_COLUMNS = 20  # column names in a message
_LONGEST_VALUE = 16 * MAX_CAPTION_BYTES  # characters of a value in CSV; longer captions than the limit leave out their image
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass(frozen=True)
class TableRule:
    """Where a table is, and which columns are read.

    `path` is a key of the dataset's source, or an absolute path on this machine. A column that is None is not read. Width and height are
    given both or neither, in pixels after EXIF rotation.
    """

    path: str
    format: str  # parquet, jsonl or csv
    filename_column: str = "id"
    includes_extension: bool | None = None  # whether names include the file's extension; None accepts both
    caption_column: str | None = None
    fallback_caption_column: str | None = None  # used where the caption is missing
    width_column: str | None = None
    height_column: str | None = None
    lists: bool = False  # whether a value may be a list of captions

    @property
    def columns(self) -> list[str]:
        """The columns to read, each once."""
        wanted = (self.filename_column, self.width_column, self.height_column, self.caption_column, self.fallback_caption_column)
        return list(dict.fromkeys(name for name in wanted if name is not None))


class Row(NamedTuple):
    """One row after validation: usable values, or the reason why the image is left out, as "kind: detail"."""

    name: str | None  # of the image, relative to the dataset's root; None if the row has none
    is_number: bool  # the name was a number, so leading zeros of file names are ignored
    width: int | None
    height: int | None
    size_problem: str | None
    captions: str | None  # a JSON list of texts, at least one
    caption_problem: str | None


def read_rows(stream: BinaryIO, rule: TableRule) -> Iterator[list[Row]]:
    """The rows of a table, in blocks. DataError if it is damaged, has another format, or lacks a column."""
    if not stream.seekable():
        stream = io.BytesIO(stream.read())
    read = {"parquet": _parquet, "jsonl": _json, "csv": _csv}[rule.format]
    validator = _RowValidator(rule)
    for block in read(stream, rule):
        yield list(map(validator.row, *block))


# One reader for each format. It yields blocks of up to `BLOCK` rows, as one list of values for each of `rule.columns`.

Block = Sequence[Sequence[Any]]


def _parquet(stream: BinaryIO, rule: TableRule) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        _require_columns(file.schema_arrow.names, rule)
        for batch in file.iter_batches(BLOCK, columns=rule.columns):
            yield [batch.column(name).to_pylist() for name in rule.columns]
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed, the table may be fine
        raise DataError(f"{rule.path} is not a Parquet table, or is damaged: {' '.join(str(error).split())[:200]}.") from error


def _json(stream: BinaryIO, rule: TableRule) -> Iterator[Block]:
    """JSON lines, or one list of objects. A row may lack a column, which is then empty; a column that no row has is an error."""
    seen: set[str] = set()
    objects = _json_objects(stream, rule)
    while block := list(itertools.islice(objects, BLOCK)):
        for place, row in block:
            if not isinstance(row, dict):
                raise DataError(f"{rule.path}, {place}: {json.dumps(row)[:40]} is not a JSON object with the columns of a row.")
            seen.update(row)
        yield [[row.get(name) for _, row in block] for name in rule.columns]
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
        return parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8; save the file as UTF-8.") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}.") from None


def _csv(stream: BinaryIO, rule: TableRule) -> Iterator[Block]:
    """CSV after RFC 4180, with column names in the first line. Separated by tabs instead of commas if the name ends in .tsv."""
    csv.field_size_limit(_LONGEST_VALUE)
    reader = csv.reader(_csv_lines(stream, rule.path), delimiter="\t" if rule.path.lower().endswith(".tsv") else ",", strict=True)
    started = 1  # the line in which the row being read starts
    try:
        heading = next(reader, [])
        _require_columns(heading, rule)
        places = [heading.index(name) for name in rule.columns]
        rows: list[list[str]] = []
        started = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(heading):
                raise DataError(
                    f"{quoted(rule.path)}, line {started}: {len(row)} values for {len(heading)} columns;"
                    " a value that contains a comma must be in double quotes."
                )
            started = reader.line_num + 1
            rows += [row] if row else []
            if len(rows) == BLOCK:
                yield [[row[place] for row in rows] for place in places]
                rows = []
        yield [[row[place] for row in rows] for place in places]
    except csv.Error as error:
        raise DataError(f"{quoted(rule.path)}, line {started}: {_csv_problem(str(error))}.") from None


def _csv_lines(stream: BinaryIO, path: str) -> Iterator[str]:
    """The lines of a text, with their ends. DataError with the number of the first line that is not UTF-8."""
    number = 0
    for data in stream:
        try:
            text = data.decode("utf-8-sig" if not number else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{quoted(path)}, line {number + 1} is not UTF-8; save the file as UTF-8.") from None
        for line in _LINE.findall(text):
            number += 1
            yield line


def _csv_problem(error: str) -> str:
    """What Python's csv module found, in words for the user."""
    if error.startswith("field larger"):
        return f"a value has more than {_LONGEST_VALUE:,} characters; probably its closing quote is missing"
    if error.startswith("unexpected end of data"):
        return "the closing quote of a value is missing"
    if "expected after" in error:
        return 'text follows the closing quote of a value; write a quote inside a quoted value twice: ""'
    return f"this is not CSV ({error})"


def _require_columns(found: Sequence[str], rule: TableRule) -> None:
    """DataError unless every column to read is there exactly once."""
    if len(found) == 1 and ";" in found[0]:  # as spreadsheets write it in countries with decimal commas
        raise DataError(f"{rule.path} separates columns with semicolons ({quoted(found[0])}); save it with commas.")
    for name in rule.columns:
        if name not in found:
            named = ", ".join(map(quoted, found[:_SHOWN_COLUMNS])) + (", ..." if len(found) > _SHOWN_COLUMNS else "")
            raise DataError(f"{quoted(rule.path)} has no column {name!r}{did_you_mean(name, found)}; it has {named or 'none'}.")
        if found.count(name) > 1:
            raise DataError(f"{rule.path} has {found.count(name)} columns {name!r}; rename all but one.")


# -- rows ------------------------------------------------------------------------------------------------------------------


class _RowValidator:
    """Validates rows. A table may have millions, so the common case is checked first."""

    def __init__(self, rule: TableRule) -> None:
        self.rule = rule
        place = {name: index for index, name in enumerate(rule.columns)}
        self.name = place[rule.filename_column]
        self.sizes = [(name, place[name]) for name in (rule.width_column, rule.height_column) if name is not None]
        self.texts = [(name, place[name]) for name in (rule.caption_column, rule.fallback_caption_column) if name is not None]

    def row(self, *values: Any) -> Row:
        """One row, from its values in the order of `rule.columns`."""
        name = values[self.name]
        if type(name) is float and name.is_integer():  # pandas makes numbers of a column with gaps floating point
            name = int(name)
        is_number = type(name) is int
        size = self._size(values) if self.sizes else (None, None, None)
        captions = self._captions(values) if self.texts else (None, None)
        return Row(str(name) if is_number else _name(name), is_number, *size, *captions)

    def _size(self, values: Sequence[Any]) -> tuple[int | None, int | None, str | None]:
        """Width, height, and the reason if they are unusable."""
        (_, wide), (_, high) = self.sizes
        width, height = values[wide], values[high]
        if type(width) is type(height) is int and width >= 1 and height >= 1 and width * height <= MAX_JPEG_PIXELS:
            return width, height, None
        found = []
        for column, place in self.sizes:
            number = _whole(values[place])
            if number is None:
                return None, None, f"no size: the column {column} of {self.rule.path} {_is(values[place])}"
            found.append(number)
        size = Size(*found)
        if size.area > MAX_JPEG_PIXELS:
            return None, None, f"too large: {size}, more than {MAX_JPEG_PIXELS / 1e6:g} megapixels"
        return size.width, size.height, None

    def _captions(self, values: Sequence[Any]) -> tuple[str | None, str | None]:
        """Captions as a JSON list, and the reason if there are none."""
        for column, place in self.texts:
            texts, problem = self._texts(column, values[place])
            if texts or problem:
                return (None if problem else json_list(texts)), problem
        columns = " and ".join(column for column, _ in self.texts)
        empty = "columns {} of {} are empty" if len(self.texts) > 1 else "column {} of {} is empty"
        return None, f"empty caption: the {empty.format(columns, self.rule.path)}"

    def _texts(self, column: str, value: Any) -> tuple[list[str], str | None]:
        """The captions in one value, and the reason if it is unusable. An empty value has no captions and no reason."""
        if type(value) is str and len(value) <= MAX_CAPTION_BYTES and _is_unicode(value):
            return ([text] if (text := clean(value)) else []), None
        if isinstance(value, list) and not self.rule.lists:
            raise DataError(f"{self.rule.path}: the column {column!r} holds lists of captions; set multiple_captions to true to use them.")
        written = value if isinstance(value, list) else [value]
        written = [text for text in written if text is not None and text == text]  # pandas writes a missing text as NaN
        here = f"the column {column} of {self.rule.path}"
        if not all(isinstance(text, str) for text in written):
            return [], f"caption is not text: {here} {_is(value)}"
        texts = [text for text in map(clean, written) if text]
        if not all(map(_is_unicode, texts)):
            return [], f"caption is not UTF-8: {here} has half of a surrogate pair"
        if (length := sum(map(len, texts))) > MAX_CAPTION_BYTES:
            return [], f"caption too long: {here} has {length:,} characters"
        return texts, None


def _name(value: Any) -> str | None:
    return value.removeprefix("./") or None if isinstance(value, str) and _is_unicode(value) else None


def _whole(value: Any) -> int | None:
    """A value of a number or text column as a whole number of pixels, at least 1. None for anything else."""
    if type(value) is int:
        return value if value >= 1 else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and number >= 1 else None


def _is(value: Any) -> str:
    """The end of a sentence about an unusable value: `is empty`, or `has 'wide'`."""
    return "is empty" if value is None or value == "" or value != value else f"has {repr(value)[:40]}"


def _is_unicode(text: str) -> bool:
    """Whether a text can be stored. JSON can contain half of a surrogate pair, which no encoding can."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
