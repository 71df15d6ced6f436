"""Mistakes to explain, not to trace, and the exit codes a run ends with."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FINISHED = 0
EXIT_FAULT = 1  # a bug of ours, or a machine that failed: a traceback
EXIT_REFUSED = 2  # settings or data refused before training: a sentence
EXIT_INTERRUPTED = 75  # stopped on request after a good save; start again to go on
EXIT_LEFT_AT_ONCE = 130  # a second signal: left without saving


class UserError(Exception):
    """Something the user can put right. The message is one sentence that names the file, key or value and the remedy."""


class ConfigError(UserError):
    """One or more settings that cannot be used; `problems` holds a sentence for each."""

    def __init__(self, *problems: str) -> None:
        self.problems: Sequence[str] = problems
        super().__init__("\n".join(problems))


class DataError(UserError):
    """Images, captions or caches that training cannot start from."""


class ModelError(UserError):
    """A model folder or file that is missing, is not a model, or is one of another family."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that belongs to another run than the one asked for."""


class StorageError(Exception):
    """A store that cannot be read or written: disk full, network gone. Ends the run with exit code 1 and this sentence."""


class TrainingError(Exception):
    """A run that cannot go on, such as one whose loss is no longer a number. Ends it with exit code 1 and this sentence."""


class Interrupted(Exception):
    """The user asked the run to stop, and everything worth keeping has been saved."""
