"""The exceptions with which a run ends on purpose, and its exit codes.

    Exception
    ├── UserError             the user can correct it: one sentence, exit code 2
    │   ├── ConfigError       settings, one sentence each
    │   ├── DataError         images, captions, caches
    │   ├── ModelError        base models
    │   └── CheckpointError   checkpoints
    ├── StorageError          disk full, network gone: one sentence, exit code 1
    ├── TrainingError         training cannot continue, such as a loss that is not finite: one sentence, exit code 1
    └── Interrupted           stopped on request, after saving: exit code 75

Any other exception is a bug of ours: a traceback, exit code 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

EXIT_FINISHED = 0
EXIT_FAULT = 1  # a bug of ours (a traceback), or a disk, network or training that failed (a sentence)
EXIT_REFUSED = 2  # settings, data, model or checkpoint refused: a sentence
EXIT_INTERRUPTED = 75  # stopped on request after saving; run the same command to resume
EXIT_LEFT_AT_ONCE = 130  # a second signal: ended at once, without saving

# Characters that act on a terminal: controls but tab and line feed, and surrogates. Marks reorder the text of a line.
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_OR_MARK = re.compile(rf"[{_CONTROLS}\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str, keep_marks: bool = False) -> str:
    r"""A message with control characters as escapes, such as \x1b, and bidirectional marks too, unless they are kept.

    Tabs and line feeds stay.
    """
    return (_CONTROL if keep_marks else _CONTROL_OR_MARK).sub(lambda match: _escaped(match[0]), text)


def quoted(value: object) -> str:
    r"""A name, path or value for use in a message.

    As it is, if all of it can be seen; else in quotes with escapes, such as 'data ' for a blank at the end or 'a\nb' for a line break.
    """
    text = str(value)
    if text and text.isprintable() and text == text.strip():
        return text
    return "'" + "".join(letter if letter.isprintable() else _escaped(letter) for letter in text) + "'"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence with the file, key or value and the remedy.

    Control characters in it, which file names may contain, are escaped. Values are quoted by `quoted`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(visible(message))


class ConfigError(UserError):
    """One or more settings that cannot be used; `problems` holds a sentence for each."""

    def __init__(self, *problems: str) -> None:
        self.problems: Sequence[str] = tuple(map(visible, problems))
        super().__init__("\n".join(problems))


class DataError(UserError):
    """Images, captions or caches that training cannot start from."""


class ModelError(UserError):
    """A model folder or file that is missing, damaged, or of another family."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or belongs to another run."""


class StorageError(Exception):
    """A store that cannot be read or written: disk full, network gone. Ends the run with exit code 1 and this sentence."""

    def __init__(self, message: str = "") -> None:
        super().__init__(visible(message))


class TrainingError(Exception):
    """A run that cannot go on, such as one whose loss is no longer a number. Ends it with exit code 1 and this sentence."""


class Interrupted(Exception):
    """The user asked the run to stop, and everything worth keeping has been saved."""


_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|STATUS_ALLOC_FAILED|failed to allocate", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device.

    torch has an exception for it, but MPS, cuDNN, cuBLAS and the CPU raise a RuntimeError that says so in their own words.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (type(error).__name__ == "OutOfMemoryError" or _OUT_OF_MEMORY.search(str(error)) is not None)
