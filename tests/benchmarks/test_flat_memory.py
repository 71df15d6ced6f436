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

STEPS = 240
long = pytest.mark.skipif(not os.environ.get("SIMPLETUNER_TEST_LONG"), reason="SIMPLETUNER_TEST_LONG=1 runs it")
# KiB per step. The pools of allocators are still filling. With new crops in each epoch, encoding is ahead by a varying amount, some MB.
# A run that kept the images of its steps would grow by 96 KiB per step.
MOST_SLOPE = {"behind": 8.0, "redrawn": 40.0}


def watch(folder: Path, model: Path, images: Path, way: str) -> flat_memory.Watched:
    return flat_memory.watched(flat_memory.settings(folder, model, images, *flat_memory.WAYS[way]), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["behind", pytest.param("redrawn", marks=long)])
def test_memory_does_not_grow_with_steps_and_an_epoch_begins_as_any_step(way: str, tmp_path: Path) -> None:
    model = write_sdxl(tmp_path / "model", sizes=SdxlSizes(unet_transformers=(1, 1, 1)))
    images = write_photographs(tmp_path / "images", 24, (120, 80))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # without the memory of other tests
        watched = alone.submit(watch, tmp_path / way, model, images, way).result()
    assert len(watched.epochs) == STEPS and watched.epochs[-1] >= 19
    assert watched.slope < MOST_SLOPE[way]
    if way != "redrawn":
        assert watched.boundary < 3


def test_the_slope_and_the_boundaries_are_those_of_what_was_seen() -> None:
    growing = flat_memory.Watched(
        [1024 * 3 * step for step in range(90)], [2.0 if step % 9 == 0 else 1.0 for step in range(90)], [step // 9 for step in range(90)]
    )
    assert growing.slope == pytest.approx(3) and growing.boundary == 2
