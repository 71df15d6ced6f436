"""Caption filters: remove or replace parts of captions, as the lines of a filter list say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex

from helpers.config.caption_filters import FilterLine, parse_filter
from helpers.errors import DataError

SECONDS = 1.0  # processor time for one line on one caption: a regular expression can backtrack for longer than the run


class CaptionFilters:
    """The lines of a filter list, compiled. They are applied in order, each to the result of the one before."""

    def __init__(self, lines: Sequence[str]) -> None:
        """DataError for an invalid line. The check of the settings has found most of them before."""
        self._filters = [_compiled(line) for line in lines]

    def apply(self, text: str, key: str) -> str:
        """The filtered text, without surrounding white space. `key` names the image in messages.

        DataError if a line takes longer than `SECONDS`: skipping it would make captions depend on the machine's speed.
        """
        for line, apply in self._filters:
            try:
                text = apply(text)
            except TimeoutError:
                raise DataError(
                    f"caption_filter_list: {line!r} takes longer than {SECONDS:g} s on the caption of {key};"
                    " rewrite it without nested repetitions such as (a+)+."
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
    # `re` of the standard library has no timeout. `regex` has one, and its version 0 has the syntax of `re`.
    pattern = regex.compile(parsed.pattern, regex.VERSION0)
    return lambda text: pattern.sub(parsed.replacement, text, timeout=SECONDS)
