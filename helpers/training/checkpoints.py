"""Checkpoints: written to a temporary folder, renamed, verified. Older ones are removed once the new one has proved good.

A checkpoint is good once it has been read back and a step with a finite loss and gradient followed it: the first step that computes with
diverged weights is the first to show that they are.

A checkpoint holds the trained weights (in the files that other tools load), the EMA, the optimizer's tensors and
`training_state.json`; `manifest.json` lists every file with its size and SHA-256. It contains no pickle and no random state:
order and noise are computed from the step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from helpers.errors import CheckpointError, StorageError
from helpers.foreign_json import parse_json
from helpers.storage.atomic import MANIFEST, atomic_folder, remove_folder, verify_manifest, write_json, write_manifest
from helpers.storage.full_disk import until_written
from helpers.storage.memo import file_state
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import CheckpointOptions

STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that has been verified against its manifest."""

    folder: Path
    content: Mapping[str, Any]  # of training_state.json

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int:
        return int(self.content["state"]["step"])

    def changed_data(self, data: Mapping[str, str], accepted: bool) -> list[str]:
        """The parts of the data's fingerprint that have changed. Raises CheckpointError that names them, unless `accepted`."""
        before = self.content["data"]
        changed = [name for name in {**before, **data} if before.get(name) != data.get(name)]
        if changed and not accepted:
            raise CheckpointError(
                f"the data has changed since {self.name}: {', '.join(changed)}. "
                "Restore it, continue on the present data with --accept_changed_data, or choose another --output_dir."
            )
        return changed

    def optimizer_tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / OPTIMIZER_FILE)


class Savable(Protocol):
    """What a checkpoint stores besides the position of the run."""

    def write_weights(self, folder: Path) -> None: ...

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and all the rest as JSON values."""
        ...


class Checkpointer:
    """Saves, finds and prunes the checkpoints of one OUTPUT_DIR. Used by the main process alone, except for `find` and `last_good`.

    `warn` gets a line about each checkpoint that is damaged or cannot be removed.
    """

    def __init__(self, options: CheckpointOptions, output_dir: Path, warn: Callable[[str], None] = _LOG.warning) -> None:
        self.options = options
        self.output_dir = output_dir
        self._warn = warn
        self._written = ""  # the checkpoint that was saved last; it is never removed
        self._awaits_proof = True  # whether pruning waits for a finite step
        self._verified: dict[str, object] = {}  # name => state of its files when they were verified

    def due(self, step: int) -> bool:
        return step % self.options.checkpointing_steps == 0 and step >= self.options.checkpointing_start

    def find(self) -> Checkpoint | None:
        """The checkpoint to resume from, or None for a new run. Skips damaged ones, with a warning about each.

        Raises CheckpointError if the checkpoint that the user named is missing or damaged, or if all checkpoints are damaged.
        """
        asked = self.options.resume_from_checkpoint
        if asked is None:
            if there := self._folders():
                raise CheckpointError(
                    f"--resume_from_checkpoint=none: {self.output_dir} already holds {there[0].name} of an earlier run. "
                    "Choose another --output_dir, or resume that run."
                )
            return None
        if asked != "latest":
            return self._named(Path(asked).name)
        candidates = self._folders()
        for folder in candidates:
            if not (problems := self._problems(folder)):
                return self._open(folder)
            self._warn(f"{folder.name} is damaged and is skipped: {problems[0]}")
        if candidates:
            raise CheckpointError(
                f"No checkpoint in {self.output_dir} is intact: restore one, or choose another --output_dir for a new run."
            )
        return None

    def save(self, step: int, learner: Savable, position: Mapping[str, Any]) -> Path:
        """Write `checkpoint-<step>` and verify it on disk. Raises StorageError. `proved_good` removes those over the limit.

        `position` is everything else that a resumed run needs, as JSON values.
        """
        final = self.output_dir / f"checkpoint-{step}"
        until_written(final, lambda: _write(final, learner, position))
        if problems := self._problems(final):
            raise StorageError(f"{final} was written but does not read back: {problems[0]}")
        self._written, self._awaits_proof = final.name, True
        return final

    def proved_good(self) -> None:
        """Call it after a step with a finite loss and gradient, and at the end of a run: older checkpoints may be removed."""
        if self._awaits_proof:
            self._awaits_proof = False
            self._prune()

    def newest(self) -> str | None:
        """The name of the checkpoint with the highest step, intact or not."""
        return next((folder.name for folder in self._folders()), None)

    def last_good(self, updates: int) -> Checkpoint | None:
        """The newest intact checkpoint that a finite step followed, when the run has updated its weights `updates` times."""
        intact = (self._open(folder) for folder in self._folders() if not self._problems(folder))
        return next((checkpoint for checkpoint in intact if checkpoint.content["state"]["updates"] < updates), None)

    def set_newer_aside(self, step: int) -> list[Path]:
        """Rename the checkpoints after `step`, the one that the run resumes from, so that they are neither resumed from nor counted.

        They are kept as `damaged-checkpoint-<N>`, or as `left-checkpoint-<N>` if the user chose the step. => their new paths.
        StorageError if renaming fails.
        """
        reason = "damaged" if self.options.resume_from_checkpoint in (None, "latest") else "left"
        newer = [folder for folder in self._folders() if _step_of(folder) > step]
        try:
            return [_set_aside(folder, reason) for folder in newer]
        except OSError as error:
            raise StorageError(f"{error.filename} could not be renamed to {error.filename2}: {error.strerror}.") from error

    def _named(self, name: str) -> Checkpoint:
        folder = self.output_dir / name
        if not folder.is_dir():
            there = ", ".join(path.name for path in self._folders()) or "none"
            raise CheckpointError(f"--resume_from_checkpoint={name}: {self.output_dir} has no such checkpoint (it has: {there}).")
        if problems := self._problems(folder):
            raise CheckpointError(f"--resume_from_checkpoint={name} is damaged: {problems[0]}.")
        return self._open(folder)

    def _open(self, folder: Path) -> Checkpoint:
        return Checkpoint(folder, parse_json((folder / STATE_FILE).read_bytes()))

    def _folders(self) -> list[Path]:
        """The folders named checkpoint-<step>, newest step first."""
        folders = [(int(match[1]), path) for path in self.output_dir.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
        return [path for _, path in sorted(folders, reverse=True)]

    def _problems(self, folder: Path) -> list[str]:
        """What `verify_manifest` finds. Files that have not been touched since they were verified are not read again."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        state = [(str(path), file_state(path)) for path in files]
        if self._verified.get(folder.name) == state:
            return []
        if not (problems := verify_manifest(folder)):
            self._verified[folder.name] = state
        return problems

    def _prune(self) -> None:
        """Keep the newest `checkpoints_total_limit` intact checkpoints and those of --keep_every; set damaged ones among them aside.

        Never removes the checkpoint that was saved last, a link, or an older one that is incomplete. What cannot be removed is reported,
        and tried again the next time.
        """
        limit, folders = self.options.checkpoints_total_limit, [folder for folder in self._folders() if not folder.is_symlink()]
        if limit is None or len(folders) <= limit:
            return  # nothing would be removed, so none needs to be read
        kept = 0
        for folder in folders:
            if kept < limit:
                kept += self._is_intact(folder)
            elif folder.name != self._written and (folder / MANIFEST).is_file() and not self._is_kept_for_good(folder):
                self._remove(folder)

    def _is_kept_for_good(self, folder: Path) -> bool:
        return bool(self.options.keep_every) and _step_of(folder) % (self.options.keep_every or 1) == 0

    def _is_intact(self, folder: Path) -> bool:
        """Whether a checkpoint verifies. A damaged one is set aside."""
        if not (problems := self._problems(folder)):
            return True
        try:
            self._warn(f"{folder.name} is damaged and was renamed to {_set_aside(folder, 'damaged').name}: {problems[0]}")
        except OSError as error:
            self._warn(f"{folder.name} is damaged and could not be renamed ({error.strerror}): {problems[0]}")
        return False

    def _remove(self, folder: Path) -> None:
        try:
            remove_folder(folder)
        except OSError as error:
            self._warn(f"{folder.name} could not be removed ({error.strerror}); what is left of it is removed later.")


def _write(final: Path, learner: Savable, position: Mapping[str, Any]) -> None:
    with atomic_folder(final) as folder:
        learner.write_weights(folder)
        tensors, numbers = learner.optimizer_state()
        save_tensors(tensors, folder / OPTIMIZER_FILE)
        write_json(folder / STATE_FILE, {**position, "numbers": numbers})
        write_manifest(folder)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _set_aside(folder: Path, reason: str) -> Path:
    """Rename a checkpoint to `<reason>-checkpoint-<N>`, numbered if that exists. => the new path. OSError."""
    names = (f"{reason}-{folder.name}{again}" for again in ("", *(f"-{number}" for number in range(2, 1000))))
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))
