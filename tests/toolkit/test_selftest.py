"""The table that tells a user whether the training step is right on their machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from toolkit import selftest
from toolkit.selftest import Row


def test_every_number_comes_out_and_is_shown() -> None:
    ended = subprocess.run([sys.executable, "toolkit/commands.py", "selftest"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    *table, last = ended.stdout.splitlines()
    assert last == f"all {len(table) - 1} checks passed" and len(table) > 30
    assert table[0].split() == ["what", "expected", "got"]
    assert all(line.startswith("ok ") for line in table[1:])
    [shift] = [line for line in table if "shift 3" in line]
    assert shift.count("0.25 0.5 0.75 0.9 0.9643") == 1 and shift.endswith("0.96429")


@pytest.mark.parametrize("got", [1.01, float("nan"), float("inf")])
def test_a_wrong_number_is_marked_and_ends_with_1(got: float, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("right", (1.0, 2.0), (1.0, 2.0005), 0.001), Row("wrong", (1.0, 1.0), (1.0, got), 0.001)]
    assert selftest.main([], lambda: iter(rows)) == 1
    _, right, wrong, last = capsys.readouterr().out.splitlines()
    assert right.split()[:2] == ["ok", "right"] and wrong.split()[:2] == ["WRONG", "wrong"]
    assert last == "1 of 2 checks failed"


def test_a_broken_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as min-SNR that divides by S whatever is predicted."""
    from helpers.objectives import diffusion

    right = diffusion.loss_weight
    monkeypatch.setattr(diffusion, "loss_weight", lambda weighting, kept, gamma, prediction: right(weighting, kept, gamma, "epsilon"))
    off = [row.what for row in selftest.weights() if not row.ok]
    assert off and all("epsilon" not in what for what in off)


def test_a_mask_that_has_no_effect_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.objectives import diffusion

    right = diffusion.weighted_loss
    monkeypatch.setattr(diffusion, "weighted_loss", lambda prediction, corrupted, options, mask: right(prediction, corrupted, options))
    assert [row.ok for row in selftest.masks()] == [False, False]


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        selftest.main(["--help"])
    assert ended.value.code == 0
    assert "exit code is 1" in capsys.readouterr().out
