"""What is said of an image: the caption strategies of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

CAPTION_EXTENSION = ".txt"  # in any case
MAX_CAPTION_BYTES = 1 << 20  # a text this long beside an image is a mistake, not a caption


@dataclass(frozen=True)
class CaptionRule:
    """Where captions come from.

    textfile: the whole file of the same name ending in .txt. filename: the name without ending, `_` read as a space.
    instanceprompt: `instance_prompt` for every image, as `only_instance_prompt` does whatever the strategy.
    `prepend_instance_prompt` puts the instance prompt and a space before each caption.
    """

    strategy: Literal["textfile", "filename", "instanceprompt"] = "filename"
    instance_prompt: str = ""
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False

    @property
    def reads_files(self) -> bool:
        """Whether captions stand in files beside the images."""
        return self.strategy == "textfile" and not self.only_instance_prompt


class CaptionError(Exception):
    """An image has no usable caption; the message is a reason to leave it out, as "kind: detail"."""


def caption_of(key: str, text: str | None, rule: CaptionRule) -> str:
    """The caption of one image; `text` is what its caption file says, None where there is no such file."""
    if rule.only_instance_prompt or rule.strategy == "instanceprompt":
        return rule.instance_prompt
    name = PurePosixPath(key)
    if rule.strategy == "filename":
        caption = " ".join(name.stem.replace("_", " ").split())
    elif text is None:
        raise CaptionError(f"no caption: {name.with_suffix(CAPTION_EXTENSION)} is missing")
    else:
        caption = text
    if not caption:
        raise CaptionError(f"empty caption: {name.with_suffix(CAPTION_EXTENSION) if rule.reads_files else name} says nothing")
    return f"{rule.instance_prompt} {caption}" if rule.prepend_instance_prompt else caption


def decode_caption(data: bytes, key: str) -> str:
    """A caption file's text: UTF-8 with or without a BOM, line ends as LF, white space around it removed. May be empty.

    CaptionError, naming the file by its key, for any other encoding: guessing would train on garbled words.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise CaptionError(f"caption too long: {key} has {len(data):,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CaptionError(f"caption is not UTF-8: {key}; save it as UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
