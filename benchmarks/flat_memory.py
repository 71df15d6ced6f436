"""Whether memory stays flat in a long run: resident memory over thousands of steps, and the time of the first step of an epoch.

    python -m benchmarks.flat_memory [--steps 6000] [--rounds 1]

A miniature model is trained for many short epochs: once with everything cached before, once with latents encoded in the background, and
once with new crops in each epoch. The slope is that of a line fitted to the resident memory over the second half of the steps. In the
first half, tables of Python and the libraries still grow, the last with a jump of 4 MB after some 2,000 steps. Before each measurement the
C library returns its reserves, which vary by megabytes. The cost of an epoch's first step is the time to get its batches, relative to
other steps.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.material import new_run, run_flags, write_photographs
from benchmarks.measure import Figure, conclude, parser, table
from benchmarks.training_step import Ours
from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.data.prepare import prepare_data
from helpers.families import FAMILIES
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl
from helpers.protocols import Reporter
from helpers.setup.datasets import data_settings, workers
from helpers.training.runtime import start_runtime
from helpers.training.steps import timed
from helpers.training.stopping import StopRequest

MOST_SLOPE = 0.25  # KiB per step; a leak of one latent of the miniature per step would exceed it
MOST_BOUNDARY = 1.5  # time of an epoch's first step, relative to other steps
IMAGES, BATCH = 48, 2
EVERY = 10  # steps between two measurements of the memory
C_LIBRARY = ctypes.CDLL(None)
WAYS = {"cached": (True, False), "behind": (False, False), "redrawn": (True, True)}  # cached before training, new crops


@dataclass(frozen=True)
class Watched:
    """Measurements of each step: resident memory at or shortly before its end (bytes), its seconds, the epoch in which it began."""

    resident: Sequence[int]
    seconds: Sequence[float]
    epochs: Sequence[int]

    @property
    def slope(self) -> float:
        """KiB per step, over the second half."""
        late = np.array(self.resident[len(self.resident) // 2 :], dtype=np.float64) / 1024
        return float(np.polyfit(np.arange(len(late)), late, 1)[0])

    @property
    def boundary(self) -> float:
        """The median time of the first steps of epochs, relative to that of the other steps."""
        first = [index > 0 and self.epochs[index] != self.epochs[index - 1] for index in range(len(self.epochs))]
        at_boundaries = [seconds for seconds, is_first in zip(self.seconds, first, strict=True) if is_first]
        others = [seconds for seconds, is_first in zip(self.seconds[1:], first[1:], strict=True) if not is_first]
        return statistics.median(at_boundaries) / statistics.median(others)


def settings(folder: Path, model: Path, images: Path, preprocess: bool, redrawn: bool) -> Config:
    folder.mkdir(parents=True)
    entry = {
        "id": "photographs",
        "instance_data_dir": str(images),
        "resolution": 64,
        "resolution_type": "pixel",
        "caption_strategy": "textfile",
        "crop": True,
        "crop_style": "random",
        "vae_cache_clear_each_epoch": redrawn,
    }
    (folder / "dataloader.json").write_text(json.dumps([entry]), encoding="utf-8")
    flags = run_flags(folder, model, model_type="lora", train_batch_size=BATCH, vae_cache_preprocess=preprocess)
    return read_config(flags, {}, known_axes())


def watched(config: Config, steps: int) -> Watched:
    """Train for some steps, and measure the process after each."""
    with start_runtime(config.run, config.cache.cache_dir, config.given, StopRequest()) as runtime:
        family = FAMILIES[config.family_name](config.model, config.cache)
        settings = data_settings(new_run(config, runtime))
        data = prepare_data(config.datasets, settings, family, workers(runtime), Reporter())
        run = Ours(config, runtime, family, data)
        resident: list[int] = []
        seconds: list[float] = []
        epochs: list[int] = []
        for batches, waited, began in timed(data.steps(0, steps)):
            run.step(batches, waited, began)
            seconds.append(time.perf_counter() - began)
            resident.append(resident_bytes() if len(seconds) % EVERY == 1 else resident[-1])
            epochs.append(batches[0].epoch)
        run.records.close()
    return Watched(resident, seconds, epochs)


def resident_bytes() -> int:
    """Resident bytes; with glibc, without the reserves of the C library."""
    if sys.platform == "linux" and hasattr(C_LIBRARY, "malloc_trim"):
        C_LIBRARY.malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(rounds=1)
    options.add_argument("--steps", type=int, default=6000)
    chosen = options.parse_args(arguments)
    figures = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, images = (
            write_sdxl(folder / "model", sizes=SdxlSizes(unet_transformers=(1, 1, 1))),
            write_photographs(folder / "images", IMAGES, (120, 80)),
        )
        for way, (preprocess, redrawn) in WAYS.items():
            rounds = [
                watched(settings(folder / f"{way}-{number}", model, images, preprocess, redrawn), chosen.steps)
                for number in range(chosen.rounds)
            ]
            slope = statistics.median(each.slope for each in rounds)
            boundary = statistics.median(each.boundary for each in rounds)
            # With new crops in each epoch, the encoder may limit such short epochs, so that figure has no gate.
            most = None if redrawn else MOST_BOUNDARY
            told = [
                Figure(f"memory, {way}", slope, "KiB/step", at_most=MOST_SLOPE),
                Figure(f"first step of an epoch, {way}", boundary, "of other steps", at_most=most),
            ]
            print(table(told), file=sys.stderr, flush=True)  # each way takes minutes
            figures += told
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
