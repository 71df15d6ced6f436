"""`./simpletuner checkpoints`: what it lists, what it finds damaged, and what it deletes."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.training.lock import lock_folder
from tests.runs.evidence import flip_byte
from tests.training.test_checkpoints import checkpointer, save, there
from toolkit.checkpoints import main


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run's folder: three checkpoints, of which one is damaged; two that were set aside; half of one that a kill left."""
    lock_folder(tmp_path, "--output_dir").close()
    save(checkpointer(tmp_path), 2, 40, 100)
    flip_byte(tmp_path / "checkpoint-100" / "weights.safetensors", -1)
    for name in ("left-checkpoint-50", "damaged-checkpoint-60-2", ".checkpoint-7.tmp.12.0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"x")
    (tmp_path / "checkpoint-final").mkdir()
    return tmp_path


def test_list(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(output)]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    names = ["checkpoint-100", "checkpoint-40", "checkpoint-2", "damaged-checkpoint-60-2", "left-checkpoint-50"]
    assert [row.split()[0] for row in rows] == names and last == f"checkpoints in {output}: 5"


def test_verify(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(output)]) == 1
    newest, second, third, *aside = capsys.readouterr().out.splitlines()
    assert "DAMAGED: " in newest and "weights.safetensors differs from what was written" in newest
    assert second.endswith("every byte is as it was written (latest)") and third.endswith("every byte is as it was written")
    assert len(aside) == 2
    flip_byte(output / "checkpoint-100" / "weights.safetensors", -1)
    assert main(["verify", str(output)]) == 0


def test_clean(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = there(output)
    assert main(["clean", str(output)]) == 0
    assert there(output) == before and "files and folders: 3; --delete deletes them" in capsys.readouterr().out
    assert main(["clean", str(output), "--delete"]) == 0
    assert there(output) == [".lock", "checkpoint-100", "checkpoint-2", "checkpoint-40", "checkpoint-final"]


def test_the_folder_of_a_run_in_progress_is_not_cleaned(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, lock = there(output), lock_folder(output, "--output_dir")
    assert main(["clean", str(output), "--delete"]) == 2
    lock.close()
    assert there(output) == before and "is in use by another run" in capsys.readouterr().err
    assert main(["list", str(output / "nowhere")]) == 2
