"""What killed writes left is removed from every folder of the run, and from no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.errors import StorageError
from helpers.storage import atomic
from helpers.storage.atomic import remove_leftovers
from tests.faults.conftest import Miniature
from tests.harness import alone_in_this_process

LEFT = ".x.png.tmp.12345.0123abcd"


def leave(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEFT).write_bytes(b"half")
    return folder / LEFT


def test_in_all_folders_of_a_run_and_only_there(small: Miniature) -> None:
    other = leave(small.output / "another run")
    linked = leave(small.trainer.folder / "elsewhere")
    cache = small.output / "cache"
    left = [leave(folder) for folder in (small.output, small.output / "validation_images", cache, cache / "memo", cache / "a" / "b")]
    (cache / "linked").symlink_to(linked.parent)
    small.run(max_train_steps=1)
    assert [path for path in left if path.exists()] == []
    assert other.exists() and linked.exists()


def test_one_that_cannot_be_removed_is_named_and_the_others_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f".{name}.tmp.1.0123abcd").write_bytes(b"")
    delete = atomic._delete

    def refuse(path: Path) -> None:
        if path.name.startswith(".a"):
            raise OSError(16, "Device or resource busy")
        delete(path)

    monkeypatch.setattr(atomic, "_delete", refuse)
    with pytest.raises(
        StorageError, match=r"\.a\.tmp\.1\.0123abcd is left of a killed run and could not be removed: Device or resource busy"
    ):
        remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".a.tmp.1.0123abcd"]


def test_they_are_removed_before_any_process_goes_on_to_write_there(tmp_path: Path) -> None:
    """Later, a file that another process is just writing would be taken for one of them."""
    from helpers.config.options import RunOptions
    from helpers.training.runtime import start_runtime
    from helpers.training.stopping import StopRequest

    output, cache = tmp_path / "out", tmp_path / "cache"
    left = [leave(output), leave(cache / "memo")]
    with alone_in_this_process(), start_runtime(RunOptions(output_dir=output), cache, (), StopRequest()):
        assert [path for path in left if path.exists()] == []
