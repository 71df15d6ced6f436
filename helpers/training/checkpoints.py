"""Checkpoints that can be trusted: written aside, verified, renamed; older ones go only when a newer one is safe.

A checkpoint holds the weights that move (in the files others load), the optimiser's tensors, the average, and
`training_state.json`; `manifest.json` lists every file with size and SHA-256. There is no pickle in it and nothing random:
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
from helpers.training.state import require_same

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import CheckpointOptions

STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte is as it was written."""

    folder: Path
    content: Mapping[str, Any]  # of training_state.json

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int:
        return int(self.content["state"]["step"])

    def require_same_run(self, identity: Mapping[str, Any]) -> None:
        """Raises CheckpointError naming every setting that is no longer what it was."""
        require_same(self.content["identity"], identity, self.name, "Set it back, or choose another --output_dir for a new run.")

    def changed_data(self, data: Mapping[str, str], accepted: bool) -> list[str]:
        """The parts of the data's fingerprint that are no longer what they were. Raises CheckpointError naming them unless `accepted`."""
        before = self.content["data"]
        changed = [name for name in {**before, **data} if before.get(name) != data.get(name)]
        if changed and not accepted:
            raise CheckpointError(
                f"{self.name} was trained on other data than is there now: {', '.join(changed)} changed. "
                "Restore the data, go on with what is there now by --accept_changed_data, or choose another --output_dir."
            )
        return changed

    def optimizer_tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / OPTIMIZER_FILE)


class Savable(Protocol):
    """What a checkpoint holds besides the position of the run."""

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

    def find(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to resume from, or None for a new run. Damaged ones are named to `say` and passed over.

        Raises CheckpointError when one is asked for by name and is missing or damaged, or when all there are are damaged.
        """
        asked = self.options.resume_from_checkpoint
        if asked is None:
            if there := self._folders():
                raise CheckpointError(
                    f"--resume_from_checkpoint=none: {self.output_dir} holds {there[0].name} of an earlier run, and two runs in one folder "
                    "could not be told apart. Choose another --output_dir, or go on with that run."
                )
            return None
        if asked != "latest":
            return self._named(Path(asked).name)
        candidates = self._folders()
        for folder in candidates:
            problems = verify_manifest(folder)
            if not problems:
                return self._open(folder)
            say(f"{folder.name} is damaged and is passed over: {problems[0]}")
        if candidates:
            raise CheckpointError(
                f"No checkpoint in {self.output_dir} is intact: restore one, or choose another --output_dir for a new run."
            )
        return None

    def save(self, step: int, learner: Savable, position: Mapping[str, Any]) -> Path:
        """Write `checkpoint-<step>`, verify it on disk, and only then remove what the limit allows. Raises StorageError.

        `position` is everything beside the learner that a resumed run needs, as JSON values.
        """
        final = self.output_dir / f"checkpoint-{step}"
        with atomic_folder(final) as folder:
            learner.write_weights(folder)
            tensors, numbers = learner.optimizer_state()
            save_tensors(tensors, folder / OPTIMIZER_FILE)
            write_json(folder / STATE_FILE, {**position, "numbers": numbers})
            write_manifest(folder)
        if problems := verify_manifest(final):
            raise StorageError(f"{final} was written and does not read back: {problems[0]}")
        self._prune()
        return final

    def set_newer_aside(self, step: int) -> list[Path]:
        """Where the run goes on from a checkpoint asked for by name, rename those beyond `step`: `latest` shall not mean the way left.

        They stay whole, as `left-checkpoint-<N>`, and are neither counted nor pruned. => their new paths. StorageError when it fails.
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
        """Remove what killed runs left half-written. For the holder of the lock on OUTPUT_DIR."""
        remove_leftovers(self.output_dir)

    def _named(self, name: str) -> Checkpoint:
        folder = self.output_dir / name
        if not folder.is_dir():
            there = ", ".join(path.name for path in self._folders()) or "none"
            raise CheckpointError(f"--resume_from_checkpoint={name}: there is no such folder in {self.output_dir} (there: {there}).")
        if problems := verify_manifest(folder):
            raise CheckpointError(f"--resume_from_checkpoint={name} is damaged: {problems[0]}.")
        return self._open(folder)

    def _open(self, folder: Path) -> Checkpoint:
        return Checkpoint(folder, json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    def _folders(self) -> list[Path]:
        """Folders that are named like checkpoints, the newest step first. Other names are nobody's business."""
        found = [(int(match[1]), path) for path in self.output_dir.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
        return [path for _, path in sorted(found, reverse=True)]

    def _prune(self) -> None:
        """Keep the newest `checkpoints_total_limit` complete checkpoints, and those of --keep_every; never a damaged one's bytes."""
        if self.options.checkpoints_total_limit is None:
            return
        complete = [folder for folder in self._folders() if (folder / MANIFEST).is_file()]
        for folder in complete[self.options.checkpoints_total_limit :]:
            step = int(folder.name.removeprefix("checkpoint-"))
            if not (self.options.keep_every and step % self.options.keep_every == 0):
                (folder / MANIFEST).unlink()  # the marker first: a folder half removed is no checkpoint
                shutil.rmtree(folder)
