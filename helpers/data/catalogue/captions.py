"""The captions of an image: where they come from (the caption strategy), and how filters, tag shuffling and prefixes change them."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from helpers.data.base.draws import seed_of
from helpers.data.catalogue.caption_filters import CaptionFilters

MAX_CAPTION_BYTES = 1 << 20  # a longer text beside an image is a mistake, not a caption
SHUFFLES = 8  # tag orders of one caption: enough to make the position meaningless, few enough to cache the embeddings of all
TABLES = ("parquet", "jsonl", "csv")
_SHOWN_KEYS = 10  # keys of a JSON file in a message
CaptionStrategy = Literal["textfile", "json", "filename", "instanceprompt", "parquet", "jsonl", "csv"]
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class TagShuffle:
    """Tags are separated by `separator`. The first `keep` of them stay first. `seed` is the run's."""

    seed: int
    keep: int = 0
    separator: str = ","


@dataclass(frozen=True)
class CaptionRule:
    """A dataset's settings for captions.

    strategy textfile: the file with the image's name and one of `extensions`. json: the same, as a JSON object that holds the caption under
    `json_key`. filename: the name without its extension, with `_` as a space. parquet, jsonl,
    csv: the image's row of a table. instanceprompt: `instance_prompt` for every image; `only_instance_prompt` does the same for any
    strategy. Captions are filtered, then their tags are shuffled, then `prepend_instance_prompt` puts the instance prompt before them.
    """

    strategy: CaptionStrategy = "filename"
    instance_prompt: str = ""
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    extensions: tuple[str, ...] = (".txt",)  # of caption files, in lower case; of several files the first in this order is read
    json_key: str = "caption"
    fallback: str = ""  # the caption of images whose caption file is missing or empty; "" leaves them out
    multiple: bool = False  # every line of a text is a caption of its own
    filters: tuple[str, ...] = ()
    shuffle: TagShuffle | None = None

    @property
    def reads_files(self) -> bool:
        """Whether captions are in files beside the images."""
        return self.strategy in ("textfile", "json") and not self.only_instance_prompt

    @property
    def table(self) -> str | None:
        """The kind of table that captions are in, or None."""
        return self.strategy if self.strategy in TABLES and not self.only_instance_prompt else None


class CaptionError(Exception):
    """An image has no usable caption. The message is the reason for leaving it out, as "kind: detail"."""


class Captioner:
    """Makes the captions of a dataset's images. They depend only on the rule, the dataset's id, the image's key and its texts."""

    def __init__(self, rule: CaptionRule, dataset: str) -> None:
        """DataError if a filter is invalid."""
        self.rule = rule
        self.dataset = dataset
        self._filters = CaptionFilters(rule.filters)

    def captions(self, key: str, texts: Sequence[str] | None) -> tuple[str, ...]:
        """All captions that an image may be trained with, at least one. A caption that appears twice is drawn twice as often.

        `texts` come from its caption file or its row of the table; None if there is no such file. CaptionError if there is no caption or
        it is not text, DataError if a filter takes too long.
        """
        made = self._captions(key, texts)
        if any("\0" in caption for caption in made):  # UTF-16 without a byte order mark is valid UTF-8, with a zero byte after every letter
            raise CaptionError("caption is not text: it holds a zero byte; save it as UTF-8 text")
        return made

    def _captions(self, key: str, texts: Sequence[str] | None) -> tuple[str, ...]:
        rule = self.rule
        if rule.only_instance_prompt or rule.strategy == "instanceprompt":
            return (rule.instance_prompt,)
        found = self._written(key, texts)
        filtered = [text for text in (self._filters.apply(text, key) for text in found) if text]
        if not filtered:
            raise CaptionError(f"empty caption: the filters leave nothing of {found[0][:80]!r}")
        shuffled = self._shuffled(key, filtered) if rule.shuffle else filtered
        return tuple(f"{rule.instance_prompt} {text}" if rule.prepend_instance_prompt else text for text in shuffled)

    def _written(self, key: str, texts: Sequence[str] | None) -> list[str]:
        """The captions before filtering. CaptionError if there is none."""
        stem = posixpath.splitext(key)[0]
        expected = " or ".join(stem + ending for ending in self.rule.extensions)
        if self.rule.fallback and not any(texts or ()):
            texts = [self.rule.fallback]
        if self.rule.strategy == "filename":
            texts = [" ".join(posixpath.basename(stem).replace("_", " ").split())]
        elif texts is None:
            raise CaptionError(f"no caption: {expected} is missing")
        if self.rule.multiple:
            texts = [line.strip() for text in texts for line in text.split("\n")]
        found = [text for text in texts if text]
        if not found:
            raise CaptionError(f"empty caption: {expected if self.rule.reads_files else posixpath.basename(key)} holds no text")
        return found

    def _shuffled(self, key: str, captions: Sequence[str]) -> list[str]:
        """Every caption in `SHUFFLES` tag orders, so that all captions stay equally likely. Unchanged if no tag of any caption can move."""
        shuffled = [[self._order(key, caption, place, number) for number in range(SHUFFLES)] for place, caption in enumerate(captions)]
        if all(len(set(same)) == 1 for same in shuffled):
            return [same[0] for same in shuffled]
        return [caption for same in shuffled for caption in same]

    def _order(self, key: str, caption: str, place: int, number: int) -> str:
        """One tag order of a caption, drawn for (seed, dataset, key, caption, order)."""
        shuffle = self.rule.shuffle
        assert shuffle is not None
        tags, between = _tags(caption, shuffle.separator)
        kept, moved = tags[: shuffle.keep], list(enumerate(tags[shuffle.keep :]))
        # Sorted by a random number for each tag, so that every Python version gives the same order.
        moved.sort(key=lambda tag: seed_of("tags", shuffle.seed, self.dataset, key, place, number, tag[0]))
        return between.join([*kept, *(tag for _, tag in moved)])


def _tags(caption: str, separator: str) -> tuple[list[str], str]:
    """A caption's tags without surrounding space, and the separator between the first two: `a, b,c` gives [a, b, c] and `, `."""
    mark = r"\s*" + re.escape(separator.strip()) + r"\s*" if separator.strip() else r"\s+"
    first = re.search(mark, caption)
    return [tag for tag in re.split(mark, caption) if tag], first[0] if first else separator


def json_list(texts: Sequence[str]) -> str:
    """Texts as a JSON list. Several times faster than `json.dumps`, for datasets with millions of captions."""
    return "[" + ", ".join(map(_encode, texts)) + "]"


def clean(text: str) -> str:
    """Line ends as LF, surrounding white space removed."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def decode_caption(data: bytes, key: str) -> str:
    """The text of a caption file: UTF-8 with or without a BOM, line ends as LF, surrounding white space removed. May be empty.

    CaptionError for any other encoding, because a wrong guess would train on garbled text. `key` names the file in it.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise CaptionError(f"caption too long: {key} has more than {MAX_CAPTION_BYTES:,} bytes")
    try:
        return clean(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CaptionError(f"caption is not UTF-8: {key}; save it as UTF-8 text") from None


def captions_in_json(text: str, key: str, rule: CaptionRule) -> list[str]:
    """The captions in the JSON file beside the image `key`, white space around them removed. CaptionError if they cannot be used."""
    name = posixpath.splitext(posixpath.basename(key))[0] + ".json"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"caption is not JSON: {name}: {error}") from None
    if not isinstance(found, dict) or rule.json_key not in found:
        keys = ", ".join(map(repr, list(found)[:_SHOWN_KEYS])) if isinstance(found, dict) else ""
        what = f"it has {keys or 'none'}" if isinstance(found, dict) else "it is not an object"
        raise CaptionError(f"no caption: {name} has no key {rule.json_key!r}; {what}")
    value: Any = found[rule.json_key]
    if isinstance(value, list) and not rule.multiple:
        raise CaptionError(f"caption is a list: {rule.json_key!r} of {name}; set multiple_captions to true to use each element")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in texts):
        raise CaptionError(f"caption is not text: {rule.json_key!r} of {name} is {json.dumps(value)[:40]}")
    return [clean(each) for each in texts]
