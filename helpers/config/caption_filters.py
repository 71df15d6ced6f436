"""The lines of a caption filter list: what each one is, judged before a run starts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.foreign_json import parse_json

MAX_LINE = 1000  # characters; a longer line is another file by mistake
_OPERATORS = frozenset("\\^$*+?[]{}|()")  # what makes a line a regular expression; a dot alone does not, as sentences end in one
_REPEAT = re.compile(r"\{(\d+)(?:,\d*)?\}")
_MAX_REPEATS = 100_000  # repeats within repeats, multiplied: what takes a tenth of a second to compile
_SLASH = re.compile(r"(?<!\\)(?:\\\\)*/")  # one that no backslash stands before


@dataclass(frozen=True)
class FilterLine:
    """One line: wherever `pattern` is found, `replacement` is put.

    A plain line is looked for letter by letter; otherwise `pattern` is a regular expression and `replacement` may name its groups.
    """

    line: str
    pattern: str
    replacement: str = ""
    is_plain: bool = False


def parse_filter(line: str) -> FilterLine:
    r"""What a line asks for: `s/a/b/` or `s/a/b` a replacement, with operators a regular expression to remove, else plain text.

    In a replacement `\/` stands for a slash. ValueError tells what is wrong with the line and how to put it right.
    """
    if not line:
        raise ValueError("has an empty line, which would be found everywhere; remove it")
    if len(line) > MAX_LINE:
        raise ValueError(f"has {len(line):,} characters; a line has at most {MAX_LINE:,}")
    slashes = [match.end() - 1 for match in _SLASH.finditer(line)]
    if line.startswith("s/") and len(slashes) >= 2:
        return _replacement(line, slashes)
    if not _OPERATORS.intersection(line):
        return FilterLine(line, line, is_plain=True)
    return _checked(FilterLine(line, line))


def _replacement(line: str, slashes: Sequence[int]) -> FilterLine:
    if len(slashes) > 3 or (len(slashes) == 3 and slashes[2] != len(line) - 1):
        raise ValueError(f"{line!r} is not of the form s/a/b/; a slash inside a or b is written \\/, and nothing follows the last one")
    end = slashes[2] if len(slashes) == 3 else len(line)
    pattern, replacement = (part.replace("\\/", "/") for part in (line[2 : slashes[1]], line[slashes[1] + 1 : end]))
    if not pattern:
        raise ValueError(f"{line!r} replaces nothing; name what to replace between the first two slashes")
    return _checked(FilterLine(line, pattern, replacement))


def _checked(found: FilterLine) -> FilterLine:
    try:
        re.compile(found.pattern).sub(found.replacement, "")
    except (re.error, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{found.line!r} is not a regular expression ({error}); put a backslash before characters that stand for themselves"
        ) from None
    if math.prod(int(count) or 1 for count in _REPEAT.findall(found.pattern)) > _MAX_REPEATS:
        raise ValueError(f"{found.line!r} asks for more than {_MAX_REPEATS:,} repeats; write it with smaller numbers")
    return found


def read_filter_file(path: Path) -> tuple[str, ...]:
    """The lines of a filter file: a JSON list of texts (.json), or a line each (.txt), empty ones aside.

    Spaces at the ends of a line belong to it. ValueError says what is wrong with the file.
    """
    if path.suffix.lower() not in (".json", ".txt"):
        raise ValueError(f"{path} is neither a .json nor a .txt file; name one of these, or write a list")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".txt":
            return tuple(line for line in text.splitlines() if line.strip())
        lines = parse_json(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{path} must hold a list of texts")
    return tuple(lines)
