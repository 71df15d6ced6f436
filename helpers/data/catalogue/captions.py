"""What is said of an image: the caption strategies of a data set."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from helpers.data.base.draws import seed_of
from helpers.data.catalogue.caption_filters import CaptionFilters

CAPTION_EXTENSION = ".txt"  # in any case
MAX_CAPTION_BYTES = 1 << 20  # a text this long beside an image is a mistake, not a caption
SHUFFLES = 8  # orders of the tags of one caption: enough to keep a place from meaning something, few enough to encode them all
TABLES = ("parquet", "jsonl", "csv")
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class TagShuffle:
    """Tags stand between `separator`s; the first `keep` of them stay in their place. `seed` is the run's."""

    seed: int
    keep: int = 0
    separator: str = ","


@dataclass(frozen=True)
class CaptionRule:
    """Where captions come from, and what is made of them.

    textfile: the file of the same name ending in .txt. filename: the name without ending, `_` read as a space. parquet, jsonl, csv: the
    image's row of a table. instanceprompt: `instance_prompt` for every image, as `only_instance_prompt` does whatever the strategy.
    What is found is filtered, then its tags are shuffled, then `prepend_instance_prompt` puts the instance prompt and a space before it.
    """

    strategy: Literal["textfile", "filename", "instanceprompt", "parquet", "jsonl", "csv"] = "filename"
    instance_prompt: str = ""
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    multiple: bool = False  # each line of a text is a caption of its own
    filters: tuple[str, ...] = ()
    shuffle: TagShuffle | None = None

    @property
    def reads_files(self) -> bool:
        """Whether captions stand in files beside the images."""
        return self.strategy == "textfile" and not self.only_instance_prompt

    @property
    def table(self) -> str | None:
        """The kind of table that captions stand in, or None."""
        return self.strategy if self.strategy in TABLES and not self.only_instance_prompt else None


class CaptionError(Exception):
    """An image has no usable caption; the message is a reason to leave it out, as "kind: detail"."""


class Captioner:
    """Makes the captions of one data set's images: a pure function of the rule, the data set's id, the image's key and its texts."""

    def __init__(self, rule: CaptionRule, dataset: str) -> None:
        """DataError for a filter that cannot be used."""
        self.rule = rule
        self.dataset = dataset
        self._filters = CaptionFilters(rule.filters)

    def captions(self, key: str, texts: Sequence[str] | None) -> tuple[str, ...]:
        """All captions that an image may be trained under, each as often as it is to be drawn; at least one.

        `texts` are what its caption file or its row of the table says, None where there is no such file. CaptionError when nothing is
        said of the image, or no text; DataError when a filter does not come to an end.
        """
        made = self._captions(key, texts)
        if any("\0" in caption for caption in made):  # UTF-16 without its mark reads as UTF-8 too, with a zero behind every letter
            raise CaptionError("caption is not text: it holds a zero byte; save it as UTF-8 text")
        return made

    def _captions(self, key: str, texts: Sequence[str] | None) -> tuple[str, ...]:
        rule = self.rule
        if rule.only_instance_prompt or rule.strategy == "instanceprompt":
            return (rule.instance_prompt,)
        found = self._said(key, texts)
        filtered = [text for text in (self._filters.apply(text, key) for text in found) if text]
        if not filtered:
            raise CaptionError(f"empty caption: the filters leave nothing of {found[0][:80]!r}")
        shuffled = self._shuffled(key, filtered) if rule.shuffle else filtered
        return tuple(f"{rule.instance_prompt} {text}" if rule.prepend_instance_prompt else text for text in shuffled)

    def _said(self, key: str, texts: Sequence[str] | None) -> list[str]:
        """The captions as they were written. CaptionError when there is none."""
        stem = posixpath.splitext(key)[0]
        if self.rule.strategy == "filename":
            texts = [" ".join(posixpath.basename(stem).replace("_", " ").split())]
        elif texts is None:
            raise CaptionError(f"no caption: {stem}{CAPTION_EXTENSION} is missing")
        if self.rule.multiple:
            texts = [line.strip() for text in texts for line in text.split("\n")]
        found = [text for text in texts if text]
        if not found:
            raise CaptionError(
                f"empty caption: {stem + CAPTION_EXTENSION if self.rule.reads_files else posixpath.basename(key)} says nothing"
            )
        return found

    def _shuffled(self, key: str, captions: Sequence[str]) -> list[str]:
        """Every caption in as many orders of its tags, so that all captions stay equally likely; as they are where no tag can move."""
        orders = [[self._order(key, caption, place, number) for number in range(SHUFFLES)] for place, caption in enumerate(captions)]
        if all(len(set(same)) == 1 for same in orders):
            return [same[0] for same in orders]
        return [caption for orders_of_one in orders for caption in orders_of_one]

    def _order(self, key: str, caption: str, place: int, number: int) -> str:
        """One order of a caption's tags, drawn for (seed, data set, key, caption, order)."""
        shuffle = self.rule.shuffle
        assert shuffle is not None
        tags, between = _tags(caption, shuffle.separator)
        kept, moved = tags[: shuffle.keep], list(enumerate(tags[shuffle.keep :]))
        # Sorted by a number drawn for each tag: the same order on every version of Python.
        moved.sort(key=lambda tag: seed_of("tags", shuffle.seed, self.dataset, key, place, number, tag[0]))
        return between.join([*kept, *(tag for _, tag in moved)])


def _tags(caption: str, separator: str) -> tuple[list[str], str]:
    """A caption's tags without the space around them, and what stands between the first two: `a, b,c` => [a, b, c], `, `."""
    mark = r"\s*" + re.escape(separator.strip()) + r"\s*" if separator.strip() else r"\s+"
    first = re.search(mark, caption)
    return [tag for tag in re.split(mark, caption) if tag], first[0] if first else separator


def json_list(texts: Sequence[str]) -> str:
    """Texts as a JSON list; several times as fast as `json.dumps`, and a data set may have millions."""
    return "[" + ", ".join(map(_encode, texts)) + "]"


def clean(text: str) -> str:
    """Line ends as LF, white space around the text removed."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def decode_caption(data: bytes, key: str) -> str:
    """A caption file's text: UTF-8 with or without a BOM, line ends as LF, white space around it removed. May be empty.

    CaptionError, naming the file by its key, for any other encoding: guessing would train on garbled words.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise CaptionError(f"caption too long: {key} has more than {MAX_CAPTION_BYTES:,} bytes")
    try:
        return clean(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CaptionError(f"caption is not UTF-8: {key}; save it as UTF-8 text") from None
