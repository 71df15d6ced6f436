"""The numbers of the golden runs are those of the records: order, draws, losses and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden.numbers import differences, measure, read_record
from tests.golden.record import RECORDS
from tests.golden.runs import GOLDEN, run, write_miniature

SHOWN = 12  # differences of a run in a failure's message


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a miniature by its name, written when first asked for."""
    folder = tmp_path_factory.mktemp("golden_models")
    return lambda name: folder / name if (folder / name).exists() else write_miniature(name, folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_run_has_the_recorded_numbers(name: str, golden_model: Callable[[str], Path], tmp_path: Path) -> None:
    found = list(differences(read_record(RECORDS / name), measure(run(name, tmp_path / "run", golden_model(GOLDEN[name].model)))))
    more = f"\n    and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    assert not found, f"golden run {name} changed:\n    " + "\n    ".join(found[:SHOWN]) + more


def test_every_record_belongs_to_a_golden_run() -> None:
    assert {folder.name for folder in RECORDS.iterdir()} == GOLDEN.keys()
