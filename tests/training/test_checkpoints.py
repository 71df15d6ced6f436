"""Which checkpoint a run resumes from, and which are removed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.config.options import CheckpointOptions
from helpers.errors import CheckpointError
from helpers.training.checkpoints import Checkpoint, Checkpointer


class Heard(Checkpointer):
    """A checkpointer and what it warned of."""

    def __init__(self, folder: Path, options: CheckpointOptions) -> None:
        self.warnings: list[str] = []
        super().__init__(options, folder, self.warnings.append)


def checkpointer(folder: Path, **options: object) -> Heard:
    return Heard(folder, dataclasses.replace(CheckpointOptions(), **options))


@dataclasses.dataclass
class OneWeight:
    """The smallest learner that a checkpoint can store."""

    value: float = 1.0
    disk_full: bool = False

    def write_weights(self, folder: Path) -> None:
        if self.disk_full:
            raise OSError(28, "No space left on device")
        save_file({"w": torch.tensor([self.value])}, folder / "weights.safetensors")

    def optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"w/exp_avg": torch.tensor([self.value])}, {"optimizer": {}, "scaler": None}


def save(target: Checkpointer, *steps: int) -> None:
    """Save at each of the steps; a finite step follows each."""
    for step in steps:
        save_unproved(target, step)
        target.proved_good()


def save_unproved(target: Checkpointer, step: int) -> None:
    target.save(step, OneWeight(step), {"state": {"step": step, "updates": step}, "settings": {}, "data": {}})


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found_by(target: Heard) -> tuple[Checkpoint | None, list[str]]:
    return target.find(), target.warnings


def test_a_run_resumes_from_the_newest_and_other_folders_are_ignored(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5, 40, 100)
    for name in ("checkpoint-final", "backup-checkpoint-3000", "checkpoint-200.old", "checkpoint-"):
        (tmp_path / name).mkdir()
    checkpoint, said = found_by(target)
    assert checkpoint is not None
    assert (checkpoint.step, said) == (100, [])
    assert checkpoint.optimizer_tensors()["w/exp_avg"].item() == 100.0


def test_no_checkpoint_is_a_new_run_and_a_new_run_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    for asked in ("latest", None):
        assert found_by(checkpointer(tmp_path, resume_from_checkpoint=asked))[0] is None
    save(checkpointer(tmp_path), 5)
    with pytest.raises(CheckpointError, match="already holds checkpoint-5 of an earlier run"):
        found_by(checkpointer(tmp_path, resume_from_checkpoint=None))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "training_state.json", "manifest.json"])
def test_a_flipped_byte_in_any_file_is_named_and_the_next_older_is_used(name: str, tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5, 10)
    path = tmp_path / "checkpoint-10" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    checkpoint, said = found_by(target)
    assert checkpoint is not None
    assert checkpoint.step == 5
    assert len(said) == 1
    assert "checkpoint-10 is damaged" in said[0]
    assert path.read_bytes() == content  # never deleted, never repaired


def test_missing_and_foreign_files_are_damage_too(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5, 10)
    (tmp_path / "checkpoint-10" / "optimizer.safetensors").unlink()
    checkpoint, said = found_by(target)
    assert checkpoint is not None
    assert checkpoint.step == 5
    assert "optimizer.safetensors is missing" in said[0]


def test_if_all_are_damaged_no_new_run_starts_in_silence(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5)
    (tmp_path / "checkpoint-5" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="No checkpoint in .* is intact"):
        found_by(target)


def test_a_checkpoint_named_by_the_user_must_exist_and_be_intact(tmp_path: Path) -> None:
    save(checkpointer(tmp_path), 5, 10)
    checkpoint, _ = found_by(checkpointer(tmp_path, resume_from_checkpoint="checkpoint-5"))
    assert checkpoint is not None
    assert checkpoint.step == 5
    with pytest.raises(CheckpointError, match=r"checkpoint-7: .* has no such checkpoint \(it has: checkpoint-10, checkpoint-5\)"):
        found_by(checkpointer(tmp_path, resume_from_checkpoint="checkpoint-7"))


def test_later_ones_are_set_aside_when_resuming_from_a_named_one(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, resume_from_checkpoint="checkpoint-2")
    for again in ("", "-2"):
        save(target, 2, 4)
        bytes_before = (tmp_path / "checkpoint-4" / "weights.safetensors").read_bytes()
        [aside] = target.set_newer_aside(2)
        assert aside.name == f"left-checkpoint-4{again}"
        assert (aside / "weights.safetensors").read_bytes() == bytes_before
    assert there(tmp_path) == ["checkpoint-2", "left-checkpoint-4", "left-checkpoint-4-2"]
    checkpoint, _ = found_by(checkpointer(tmp_path))
    assert checkpoint is not None and checkpoint.step == 2


def test_nothing_is_set_aside_when_resuming_from_the_newest(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 2, 4)
    assert target.set_newer_aside(4) == []
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_old_ones_are_removed_only_after_a_newer_one_is_complete(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=2)
    save(target, 5, 10, 15)
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-15"]
    with pytest.raises(Exception, match="No space left"):
        target.save(20, OneWeight(disk_full=True), {"state": {"step": 20}})
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-15"]


def test_a_limit_of_one_keeps_the_one_just_written(tmp_path: Path) -> None:
    save(checkpointer(tmp_path, checkpoints_total_limit=1), 5, 10)
    assert there(tmp_path) == ["checkpoint-10"]


def test_keep_every_keeps_one_for_good(tmp_path: Path) -> None:
    save(checkpointer(tmp_path, checkpoints_total_limit=1, keep_every=10), 5, 10, 15, 20, 25)
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-25"]


def test_damaged_folders_do_not_count_and_are_set_aside(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=2)
    save(target, 5, 10)
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    save(target, 15)
    assert there(tmp_path) == ["checkpoint-15", "checkpoint-5", "damaged-checkpoint-10"]
    assert target.warnings[0].startswith("checkpoint-10 is damaged and was renamed to damaged-checkpoint-10: ")


def test_changed_data_is_named_and_must_be_accepted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint-5", {"settings": {}, "data": {"plan": "a", "captions": "c"}, "state": {"step": 5}})
    with pytest.raises(CheckpointError, match=r"has changed since checkpoint-5: plan.*--accept_changed_data"):
        checkpoint.changed_data({"plan": "b", "captions": "c"}, accepted=False)
    assert checkpoint.changed_data({"plan": "b", "captions": "c"}, accepted=True) == ["plan"]
    assert checkpoint.changed_data({"plan": "a", "captions": "c"}, accepted=False) == []
