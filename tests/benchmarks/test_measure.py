"""The table of a benchmark shows which gates are met and which are missed."""

from __future__ import annotations

import pytest

from benchmarks.measure import Figure, compared, conclude, in_turns


def test_the_ratio_is_judged_round_by_round_so_that_a_burst_of_other_work_does_not_count() -> None:
    figure = compared("step", "ms", [(10, 10.2), (30, 30.6), (10, 10.2)], at_most=1.05)
    assert figure.ratio == pytest.approx(1.02)
    assert (figure.limit, figure.value) == (10, 10.2)
    assert figure.kept


def test_a_missed_gate_is_named_and_ends_in_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = Figure("fast", 3.0, "s", at_most=4.0), Figure("slow", 5.0, "s", at_most=4.0)
    assert conclude([fast], rounds=5) == 0
    assert "MISSED" not in capsys.readouterr().out
    assert conclude([fast, slow], rounds=5) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("MISSED")] == ["slow"]
    assert "<= 4 s" in lines[1]


def test_a_gate_can_be_on_the_value_although_there_is_a_ratio() -> None:
    rounds = [(24_000.0, 10_000.0)]
    assert compared("scan", "/s", rounds, at_least=5_000, gates_value=True).kept
    assert not compared("scan", "/s", rounds, at_least=0.85).kept


def test_loops_take_turns() -> None:
    order: list[str] = []
    in_turns(2, lambda: order.append("bare"), lambda: order.append("ours"))
    assert order == ["bare", "ours", "bare", "ours"]
