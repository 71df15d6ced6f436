"""Which checkpoint is gone on from, and which may go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.config.options import CheckpointOptions
from helpers.errors import CheckpointError
from helpers.training.checkpoints import Checkpoint, Checkpointer


def checkpointer(folder: Path, **options: object) -> Checkpointer:
    return Checkpointer(dataclasses.replace(CheckpointOptions(), **options), folder)


def learner(value: float = 1.0) -> Any:
    """The smallest thing that writes weights and has an optimiser's state."""

    def write_weights(folder: Path) -> None:
        save_file({"w": torch.tensor([value])}, folder / "weights.safetensors")

    engine = SimpleNamespace(state=lambda: ({"w/exp_avg": torch.tensor([value])}, {"optimizer": {}, "scaler": None}))
    return SimpleNamespace(write_weights=write_weights, engine=engine)


def save(target: Checkpointer, *steps: int) -> None:
    for step in steps:
        target.save(step, learner(step), {"state": {"step": step}, "identity": {}, "data": {}})


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found_by(target: Checkpointer) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return target.find(said.append), said


def test_the_newest_is_gone_on_from_and_other_names_are_nobodys_business(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5, 40, 100)
    for name in ("checkpoint-final", "backup-checkpoint-3000", "checkpoint-200.old", "checkpoint-"):
        (tmp_path / name).mkdir()
    found, said = found_by(target)
    assert found is not None
    assert (found.step, said) == (100, [])
    assert found.optimizer_tensors()["w/exp_avg"].item() == 100.0


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
    found, said = found_by(target)
    assert found is not None
    assert found.step == 5
    assert len(said) == 1
    assert "checkpoint-10 is damaged" in said[0]
    assert path.read_bytes() == content  # never deleted, never repaired


def test_missing_and_foreign_files_are_damage_too(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5, 10)
    (tmp_path / "checkpoint-10" / "optimizer.safetensors").unlink()
    found, said = found_by(target)
    assert found is not None
    assert found.step == 5
    assert "optimizer.safetensors is missing" in said[0]


def test_when_all_are_damaged_it_does_not_quietly_start_anew(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 5)
    (tmp_path / "checkpoint-5" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="No checkpoint in .* is intact"):
        found_by(target)


def test_a_checkpoint_asked_for_by_name_must_be_there_and_whole(tmp_path: Path) -> None:
    save(checkpointer(tmp_path), 5, 10)
    found, _ = found_by(checkpointer(tmp_path, resume_from_checkpoint="checkpoint-5"))
    assert found is not None
    assert found.step == 5
    with pytest.raises(CheckpointError, match=r"checkpoint-7: .* has no such checkpoint \(it has: checkpoint-10, checkpoint-5\)"):
        found_by(checkpointer(tmp_path, resume_from_checkpoint="checkpoint-7"))


def test_where_a_named_one_is_gone_on_from_later_ones_are_set_aside_whole(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, resume_from_checkpoint="checkpoint-2")
    for again in ("", "-2"):
        save(target, 2, 4)
        bytes_before = (tmp_path / "checkpoint-4" / "weights.safetensors").read_bytes()
        [aside] = target.set_newer_aside(2)
        assert aside.name == f"left-checkpoint-4{again}"
        assert (aside / "weights.safetensors").read_bytes() == bytes_before
    assert there(tmp_path) == ["checkpoint-2", "left-checkpoint-4", "left-checkpoint-4-2"]
    found, _ = found_by(checkpointer(tmp_path))
    assert found is not None and found.step == 2


def test_later_ones_stay_where_the_newest_is_gone_on_from(tmp_path: Path) -> None:
    target = checkpointer(tmp_path)
    save(target, 2, 4)
    assert target.set_newer_aside(2) == []
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_old_ones_go_only_when_a_newer_one_is_whole(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=2)
    save(target, 5, 10, 15)
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-15"]
    broken = learner()
    broken.write_weights = lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(Exception, match="No space left"):
        target.save(20, broken, {"state": {"step": 20}})
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-15"]


def test_a_limit_of_one_keeps_the_one_just_written(tmp_path: Path) -> None:
    save(checkpointer(tmp_path, checkpoints_total_limit=1), 5, 10)
    assert there(tmp_path) == ["checkpoint-10"]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path: Path) -> None:
    save(checkpointer(tmp_path, checkpoints_total_limit=1, keep_every=10), 5, 10, 15, 20, 25)
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-25"]


def test_damaged_folders_do_not_count_and_are_not_removed(tmp_path: Path) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=2)
    save(target, 5, 10)
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    save(target, 15)
    assert there(tmp_path) == ["checkpoint-10", "checkpoint-15", "checkpoint-5"]


def test_differences_are_named_all_at_once(tmp_path: Path) -> None:
    found = Checkpoint(tmp_path / "checkpoint-5", {"identity": {"seed": 1, "lora_rank": 16}, "data": {"plan": "a"}, "state": {"step": 5}})
    with pytest.raises(CheckpointError, match="seed was 1 and is now 2; lora_rank was 16 and is now 8"):
        found.require_same_run({"seed": 2, "lora_rank": 8})
    found.require_same_run({"seed": 1, "lora_rank": 16})


def test_changed_data_is_named_and_must_be_accepted(tmp_path: Path) -> None:
    found = Checkpoint(tmp_path / "checkpoint-5", {"identity": {}, "data": {"plan": "a", "captions": "c"}, "state": {"step": 5}})
    with pytest.raises(CheckpointError, match=r"plan changed.*--accept_changed_data"):
        found.changed_data({"plan": "b", "captions": "c"}, accepted=False)
    assert found.changed_data({"plan": "b", "captions": "c"}, accepted=True) == ["plan"]
    assert found.changed_data({"plan": "a", "captions": "c"}, accepted=False) == []
