"""A stop during validation loses no images: the resumed run generates them with the weights of that step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.errors import Interrupted
from helpers.training import validation
from tests.faults.conftest import Miniature, Stop

VALIDATED = {
    "validation_prompt": "a red circle",
    "num_validation_images": 2,
    "validation_steps": 2,
    "validation_resolution": "64",
    "checkpointing_steps": 100,
}


def stop_after_first_image_of(step: int, ask_to_stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    write = validation._write_png

    def write_and_ask(pixels: torch.Tensor, path: Path) -> None:
        write(pixels, path)
        if path.name.startswith(f"step_{step}_"):
            ask_to_stop()

    monkeypatch.setattr(validation, "_write_png", write_and_ask)


def images_of(folder: Path, step: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "validation_images").glob(f"step_{step}_*.png")}


def test_a_stop_during_validation(small: Miniature, ask_to_stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, saved in ((0, []), (2, ["checkpoint-2"]), (4, ["checkpoint-2", "checkpoint-4"])):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="run the same command to resume"):
            stop_after_first_image_of(step, ask_to_stop, patch)
            small.run(**VALIDATED)
        assert sorted(path.name for path in small.output.glob("checkpoint-*")) == saved
        assert len(images_of(small.output, str(step))) == 1
    small.run(**VALIDATED)
    assert len(images_of(small.output)) == 6
    assert images_of(small.output) == images_of(small.run("undisturbed", **VALIDATED).folder)
