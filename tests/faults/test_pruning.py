"""Which checkpoints are removed, and what happens when one is damaged, linked, or cannot be removed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from helpers.config.options import CheckpointOptions
from helpers.storage.atomic import remove_leftovers, verify_manifest
from helpers.training.checkpoints import Checkpointer
from tests.runs.evidence import flip_byte
from tests.training.test_checkpoints import checkpointer, save, save_unproved, there

WEIGHTS = "weights.safetensors"


def test_a_damaged_newest_checkpoint_never_costs_an_intact_one(tmp_path: Path) -> None:
    save(checkpointer(tmp_path, checkpoints_total_limit=2), 4, 6)
    flip_byte(tmp_path / "checkpoint-6" / WEIGHTS, -1)
    resumed = checkpointer(tmp_path, checkpoints_total_limit=1)
    start = resumed.find()
    assert start is not None and start.step == 4
    assert [path.name for path in resumed.set_newer_aside(4)] == ["damaged-checkpoint-6"]
    save_unproved(resumed, 5)
    assert there(tmp_path) == ["checkpoint-4", "checkpoint-5", "damaged-checkpoint-6"]
    resumed.proved_good()
    assert there(tmp_path) == ["checkpoint-5", "damaged-checkpoint-6"]
    assert verify_manifest(tmp_path / "checkpoint-5") == []


def test_what_was_just_saved_is_never_removed_though_others_have_higher_steps(tmp_path: Path) -> None:
    save(checkpointer(tmp_path), 50)
    save(checkpointer(tmp_path, checkpoints_total_limit=1), 5)
    assert there(tmp_path) == ["checkpoint-5", "checkpoint-50"]


def test_damage_that_keeps_the_size_is_not_counted_as_a_checkpoint(tmp_path: Path) -> None:
    save(checkpointer(tmp_path), 5, 10, 15)
    flip_byte(tmp_path / "checkpoint-10" / WEIGHTS, -1)
    save(checkpointer(tmp_path, checkpoints_total_limit=2), 15)
    assert there(tmp_path) == ["checkpoint-15", "checkpoint-5", "damaged-checkpoint-10"]


def test_a_checkpoint_that_cannot_be_removed_is_told_and_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=1)
    save(target, 5)
    save_unproved(target, 10)

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        target.proved_good()
    assert target.warnings == ["checkpoint-5 could not be removed (Directory not empty); what is left of it is removed later."]
    assert [name for name in there(tmp_path) if not name.startswith(".")] == ["checkpoint-10"]
    remove_leftovers(tmp_path)
    assert there(tmp_path) == ["checkpoint-10"]


def test_a_linked_checkpoint_stays_as_it_is_with_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "out"
    output.mkdir()
    save(checkpointer(output), 5)
    (output / "checkpoint-5").rename(elsewhere)
    (output / "checkpoint-5").symlink_to(elsewhere)
    save(checkpointer(output, checkpoints_total_limit=1), 10, 15)
    assert there(output) == ["checkpoint-15", "checkpoint-5"] and verify_manifest(elsewhere) == []


def test_a_link_that_is_saved_over_is_removed_and_not_followed(tmp_path: Path) -> None:
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "out"
    output.mkdir()
    save(checkpointer(output), 5)
    (output / "checkpoint-5").rename(elsewhere)
    (output / "checkpoint-5").symlink_to(elsewhere)
    save(checkpointer(output), 5)
    assert there(output) == ["checkpoint-5"] and not (output / "checkpoint-5").is_symlink()
    assert verify_manifest(elsewhere) == []


def test_a_kill_while_a_checkpoint_is_removed_leaves_nothing_that_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = checkpointer(tmp_path, checkpoints_total_limit=1)
    save(target, 5)
    save_unproved(target, 10)

    def killed(path: Path) -> None:
        os.unlink(path / WEIGHTS)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        target.proved_good()
    assert [name for name in there(tmp_path) if not name.startswith(".")] == ["checkpoint-10"]
    assert len(remove_leftovers(tmp_path)) == 1 and there(tmp_path) == ["checkpoint-10"]


def test_verified_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning at every save must not read every checkpoint at every save."""
    verified: list[str] = []
    verify = verify_manifest
    monkeypatch.setattr("helpers.training.checkpoints.verify_manifest", lambda folder: verified.append(folder.name) or verify(folder))
    save(Checkpointer(CheckpointOptions(checkpoints_total_limit=2), tmp_path), 5, 10, 15, 20)
    assert verified == ["checkpoint-5", "checkpoint-10", "checkpoint-15", "checkpoint-20"]
