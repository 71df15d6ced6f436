"""JSON as people write it: comments and trailing commas allowed, the line of every key remembered, bad files refused early."""

from __future__ import annotations

import bisect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.errors import ConfigError

MAX_BYTES = 4 * 2**20  # a dataloader file is a few KB; more is another file by mistake
MAX_DEPTH = 32

Place = tuple[int | str, ...]  # (2, "crop_style"): where in the document a value stands

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<number>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<mark>[{}\[\],:])
    |(?P<word>\w+)""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class JsonDocument:
    """A parsed file. `lines` tells where each key and list element begins, counted from 1."""

    path: Path
    value: Any
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """`data.json, line 7` for the nearest place that is known."""
        while place and place not in self.lines:
            place = place[:-1]
        line = self.lines.get(place)
        return f"{self.path}, line {line}" if line else str(self.path)


def read_json(path: Path) -> JsonDocument:
    """Read a JSON file; ConfigError names file and line when it is missing, too large, too deep, ambiguous or not JSON."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES // 2**20} MiB; this is not a settings file.")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path.") from None
    return _Reader(path, text).document()


class _Reader:
    """Recursive descent over the tokens of one text."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text
        self.at = 0  # first character not read yet
        self.start = 0  # first character of the last token
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[Place, int] = {}

    def document(self) -> JsonDocument:
        value = self._value(self._next(), ())
        kind, token = self._next()
        if kind != "end":
            raise self._error(f"{token!r} after the end of the document")
        return JsonDocument(self.path, value, self.lines)

    def _next(self) -> tuple[str, str]:
        """(kind, text) of the next token that is not space; kind "end" at the end."""
        while self.at < len(self.text):
            match = _TOKEN.match(self.text, self.at)
            self.start = self.at
            if match is None:
                raise self._error(f"{self.text[self.at]!r} is not expected here; text stands in double quotes, on one line")
            self.at = match.end()
            if match.lastgroup != "space":
                return str(match.lastgroup), match[0]
        self.start = self.at
        return "end", ""

    def _value(self, token: tuple[str, str], place: Place) -> Any:
        kind, text = token
        if len(place) > MAX_DEPTH:
            raise self._error(f"nested deeper than {MAX_DEPTH}")
        if text == "{" and kind == "mark":
            return self._object(place)
        if text == "[" and kind == "mark":
            return self._list(place)
        if kind == "string":
            return self._string(text)
        if kind == "number":
            return self._number(text)
        if text in _WORDS:
            return _WORDS[text]
        raise self._error("the file ends too early" if kind == "end" else f"{text} is not a value; text stands in double quotes")

    def _object(self, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (token := self._next()) != ("mark", "}"):
            if token[0] != "string":
                raise self._error(f"a key in double quotes is expected, not {token[1] or 'the end of the file'}")
            key = self._string(token[1])
            if key in found:
                raise self._error(f'the key "{key}" stands twice in one object; remove one')
            self.lines[(*place, key)] = self._line()
            if self._next() != ("mark", ":"):
                raise self._error(f'a colon is missing after "{key}"')
            found[key] = self._value(self._next(), (*place, key))
            if self._ended("}"):
                break
        return found

    def _list(self, place: Place) -> list[Any]:
        found: list[Any] = []
        while (token := self._next()) != ("mark", "]"):
            here = (*place, len(found))
            self.lines[here] = self._line()
            found.append(self._value(token, here))
            if self._ended("]"):
                break
        return found

    def _ended(self, close: str) -> bool:
        """After an element: True at `close`, False at a comma."""
        _, text = self._next()
        if text not in (",", close):
            raise self._error(f"a comma or {close} is missing before {text or 'the end of the file'}")
        return text == close

    def _string(self, text: str) -> str:
        try:
            return str(json.loads(text, strict=False))
        except json.JSONDecodeError as error:
            raise self._error(f"{text} cannot be read: {error.msg}; a backslash is written twice") from None

    def _number(self, text: str) -> int | float:
        value = float(text)
        if not math.isfinite(value):
            raise self._error(f"{text} is not a finite number")
        return value if re.search(r"[.eE]", text) else int(text)

    def _line(self) -> int:
        return bisect.bisect_right(self.newlines, self.start - 1) + 1

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {self._line()}: {what}.")
