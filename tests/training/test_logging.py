"""What libraries say in a run: their warnings, less the notes that a user can do nothing about."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from helpers.training.runtime import configure_logging

NOTES = {
    "transformers.utils.import_utils": "`CLIPImageProcessor` requires torchvision (not installed); falling back",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.",
}


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    before = {name: list(logging.getLogger(name).filters) for name in NOTES}
    level = logging.getLogger("helpers").level
    yield
    logging.getLogger("helpers").setLevel(level)
    for name, filters in before.items():
        logging.getLogger(name).filters = filters


@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_concerns_nobody_is_not_shown_and_any_other_warning_of_its_library_is(name: str) -> None:
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger(name)
    library.addHandler(handler)
    try:
        configure_logging()
        library.warning(NOTES[name])
        library.warning("something that matters")
    finally:
        library.removeHandler(handler)
    assert shown == ["something that matters"]
