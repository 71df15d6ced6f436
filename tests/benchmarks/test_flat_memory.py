"""The short form of benchmarks/flat_memory.py: memory that grows with every step is visible after a few hundred steps."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks import flat_memory
from benchmarks.material import write_photographs
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl

IMAGES = 16
STEPS = 160 if not os.environ.get("SIMPLETUNER_TEST_LONG") else 480
# KiB per step. The pools of allocators are still filling. With new crops in each epoch, encoding is ahead by a varying amount, some MB.
# A run that kept the images of its steps would grow by 96 KiB per step.
MOST_SLOPE = {"behind": 8.0, "redrawn": 40.0}


def watch(folder: Path, model: Path, images: Path) -> dict[str, flat_memory.Watched]:
    """One way after the other, in one process."""
    settings = {way: flat_memory.settings(folder / way, model, images, *flat_memory.WAYS[way]) for way in MOST_SLOPE}
    return {way: flat_memory.watched(config, STEPS) for way, config in settings.items()}


@pytest.mark.slow
def test_memory_does_not_grow_with_steps_and_an_epoch_begins_as_any_step(tmp_path: Path) -> None:
    model = write_sdxl(tmp_path / "model", sizes=SdxlSizes(unet_transformers=(1, 1, 1)))
    images = write_photographs(tmp_path / "images", IMAGES, (80, 64))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # without the memory of other tests
        found = alone.submit(watch, tmp_path, model, images).result()
    for way, watched in found.items():
        assert len(watched.epochs) == STEPS and watched.epochs[-1] >= 19
        assert watched.slope < MOST_SLOPE[way], way
    assert found["behind"].boundary < 3


def test_the_slope_and_the_boundaries_are_those_of_what_was_seen() -> None:
    growing = flat_memory.Watched(
        [1024 * 3 * step for step in range(90)], [2.0 if step % 9 == 0 else 1.0 for step in range(90)], [step // 9 for step in range(90)]
    )
    assert growing.slope == pytest.approx(3) and growing.boundary == 2
