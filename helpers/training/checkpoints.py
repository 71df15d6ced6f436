"""Checkpoints: written to a temporary folder, renamed, verified; older ones are removed only once the new one reads back.

A checkpoint holds the trained weights (in the files that other tools load), the EMA, the optimizer's tensors and
`training_state.json`; `manifest.json` lists every file with its size and SHA-256. It contains no pickle and no random state:
order and noise are computed from the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from helpers.errors import CheckpointError, StorageError
from helpers.storage.atomic import MANIFEST, atomic_folder, remove_leftovers, verify_manifest, write_json, write_manifest
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import CheckpointOptions

STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


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
    """Saves, finds and prunes the checkpoints of one OUTPUT_DIR. Used by the main process alone, except for `find`."""

    def __init__(self, options: CheckpointOptions, output_dir: Path) -> None:
        self.options = options
        self.output_dir = output_dir

    def due(self, step: int) -> bool:
        return step % self.options.checkpointing_steps == 0

    def find(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to resume from, or None for a new run. Skips damaged ones and passes a line about each to `warn`.

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
            problems = verify_manifest(folder)
            if not problems:
                return self._open(folder)
            warn(f"{folder.name} is damaged and is skipped: {problems[0]}")
        if candidates:
            raise CheckpointError(
                f"No checkpoint in {self.output_dir} is intact: restore one, or choose another --output_dir for a new run."
            )
        return None

    def save(self, step: int, learner: Savable, position: Mapping[str, Any]) -> Path:
        """Write `checkpoint-<step>`, verify it on disk, then remove those over the limit. Raises StorageError.

        `position` is everything else that a resumed run needs, as JSON values.
        """
        final = self.output_dir / f"checkpoint-{step}"
        with atomic_folder(final) as folder:
            learner.write_weights(folder)
            tensors, numbers = learner.optimizer_state()
            save_tensors(tensors, folder / OPTIMIZER_FILE)
            write_json(folder / STATE_FILE, {**position, "numbers": numbers})
            write_manifest(folder)
        if problems := verify_manifest(final):
            raise StorageError(f"{final} was written but does not read back: {problems[0]}")
        self._prune()
        return final

    def set_newer_aside(self, step: int) -> list[Path]:
        """If the user named a checkpoint to resume from, rename those after `step`, so that `latest` does not pick them next time.

        They are kept as `left-checkpoint-<N>`, and are neither counted nor pruned. => their new paths. StorageError if renaming fails.
        """
        if self.options.resume_from_checkpoint in (None, "latest"):
            return []
        moved = []
        for folder in self._folders():
            if int(folder.name.removeprefix("checkpoint-")) > step:
                names = (f"left-{folder.name}{again}" for again in ("", *(f"-{number}" for number in range(2, 1000))))
                aside = next(path for path in map(self.output_dir.joinpath, names) if not path.exists())
                try:
                    moved.append(folder.rename(aside))
                except OSError as error:
                    raise StorageError(f"{folder} could not be renamed to {aside.name}: {error.strerror}.") from error
        return moved

    def tidy(self) -> None:
        """Remove files that killed runs left half-written. Call it only while holding the lock on OUTPUT_DIR."""
        remove_leftovers(self.output_dir)

    def _named(self, name: str) -> Checkpoint:
        folder = self.output_dir / name
        if not folder.is_dir():
            there = ", ".join(path.name for path in self._folders()) or "none"
            raise CheckpointError(f"--resume_from_checkpoint={name}: {self.output_dir} has no such checkpoint (it has: {there}).")
        if problems := verify_manifest(folder):
            raise CheckpointError(f"--resume_from_checkpoint={name} is damaged: {problems[0]}.")
        return self._open(folder)

    def _open(self, folder: Path) -> Checkpoint:
        return Checkpoint(folder, json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    def _folders(self) -> list[Path]:
        """The folders named checkpoint-<step>, newest step first."""
        folders = [(int(match[1]), path) for path in self.output_dir.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
        return [path for _, path in sorted(folders, reverse=True)]

    def _prune(self) -> None:
        """Keep the newest `checkpoints_total_limit` complete checkpoints and those of --keep_every. Never touches an incomplete one."""
        if self.options.checkpoints_total_limit is None:
            return
        complete = [folder for folder in self._folders() if (folder / MANIFEST).is_file()]
        for folder in complete[self.options.checkpoints_total_limit :]:
            step = int(folder.name.removeprefix("checkpoint-"))
            if not (self.options.keep_every and step % self.options.keep_every == 0):
                (folder / MANIFEST).unlink()  # first: without it a half-removed folder does not count as a checkpoint
                shutil.rmtree(folder)
