"""Removes and replaces parts of captions, as the lines of a filter list say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex

from helpers.config.caption_filters import FilterLine, parse_filter
from helpers.errors import DataError

SECONDS = 1.0  # of processor time that one line may take on one caption. An expression that backtracks without end takes longer than a run.


class CaptionFilters:
    """The lines of a filter list, compiled once; each is applied once, in order, to what the one before it left."""

    def __init__(self, lines: Sequence[str]) -> None:
        """DataError for a line that cannot be used; the settings' own check has told of most before."""
        self._filters = [_compiled(line) for line in lines]

    def apply(self, text: str, key: str) -> str:
        """The text as it is trained under, white space around it removed; `key` is the image's, for messages.

        DataError where a line takes longer than `SECONDS`. To skip it instead would make captions depend on the machine's speed.
        """
        for line, apply in self._filters:
            try:
                text = apply(text)
            except TimeoutError:
                raise DataError(
                    f"caption_filter_list: {line!r} takes longer than {SECONDS:g} s on the caption of {key};"
                    " write it without repetitions inside repetitions."
                ) from None
        return text.strip() if self._filters else text


def _compiled(line: str) -> tuple[str, Callable[[str], str]]:
    try:
        parsed = parse_filter(line)
        return line, _plain(parsed) if parsed.is_plain else _expression(parsed)
    except (ValueError, regex.error) as error:
        raise DataError(f"caption_filter_list: {line!r}: {error}.") from None


def _plain(parsed: FilterLine) -> Callable[[str], str]:
    return lambda text: text.replace(parsed.pattern, "")


def _expression(parsed: FilterLine) -> Callable[[str], str]:
    # The standard library's `re` cannot be interrupted; `regex` can, and its version 0 reads expressions as `re` does.
    pattern = regex.compile(parsed.pattern, regex.VERSION0)
    return lambda text: pattern.sub(parsed.replacement, text, timeout=SECONDS)
