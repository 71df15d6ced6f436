"""Whether a long run stays as it began: resident memory over thousands of steps, and what the first step of an epoch costs.

    python -m benchmarks.flat_memory [--steps 6000] [--rounds 1]

The miniature is trained for many short epochs, once with everything cached beforehand, once with latents encoded behind training, and
once with cuts drawn anew each epoch. The slope is that of a line through the resident memory over the second half of the steps: in the
first, tables of Python and the libraries still find their sizes, the last by a jump of 4 MB after some 2,000 steps. The C library first
gives back what it only keeps in reserve, which comes and goes by megabytes. The cost of an epoch's first steps is that of asking for
their batches, beside other steps.
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
from helpers.families.tiny import SdxlSizes, write_sdxl
from helpers.protocols import Reporter
from helpers.setup.datasets import data_settings, workers
from helpers.training.runtime import start_runtime
from helpers.training.steps import timed
from helpers.training.stopping import StopRequest

MOST_SLOPE = 0.25  # KiB a step; a step that kept one latent of the miniature would be above it
MOST_BOUNDARY = 1.5  # what the first step of an epoch takes, beside other steps
PICTURES, BATCH = 48, 2
EVERY = 10  # steps between two looks at the memory
C_LIBRARY = ctypes.CDLL(None)
WAYS = {"cached": (True, False), "behind": (False, False), "redrawn": (True, True)}  # encoded before training, drawn anew


@dataclass(frozen=True)
class Watched:
    """What was seen of each step: the resident memory after it or a little before (bytes), its seconds, the epoch it began in."""

    resident: Sequence[int]
    seconds: Sequence[float]
    epochs: Sequence[int]

    @property
    def slope(self) -> float:
        """KiB a step, over the second half."""
        late = np.array(self.resident[len(self.resident) // 2 :], dtype=np.float64) / 1024
        return float(np.polyfit(np.arange(len(late)), late, 1)[0])

    @property
    def boundary(self) -> float:
        """The median time of the first step of an epoch, beside that of the others."""
        first = [index > 0 and self.epochs[index] != self.epochs[index - 1] for index in range(len(self.epochs))]
        at_boundaries = [seconds for seconds, is_first in zip(self.seconds, first, strict=True) if is_first]
        others = [seconds for seconds, is_first in zip(self.seconds[1:], first[1:], strict=True) if not is_first]
        return statistics.median(at_boundaries) / statistics.median(others)


def settings(folder: Path, model: Path, pictures: Path, preprocess: bool, redrawn: bool) -> Config:
    folder.mkdir(parents=True)
    entry = {
        "id": "photographs",
        "instance_data_dir": str(pictures),
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
    """Train for some steps, and look at the process after each."""
    with start_runtime(config.run, {"--output_dir": config.run.output_dir}, config.given, StopRequest()) as runtime:
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
    """What is in use: where glibc is the C library, without what it keeps in reserve."""
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
        model, pictures = (
            write_sdxl(folder / "model", sizes=SdxlSizes(unet_transformers=(1, 1, 1))),
            write_photographs(folder / "pictures", PICTURES, (120, 80)),
        )
        for way, (preprocess, redrawn) in WAYS.items():
            rounds = [
                watched(settings(folder / f"{way}-{number}", model, pictures, preprocess, redrawn), chosen.steps)
                for number in range(chosen.rounds)
            ]
            slope = statistics.median(each.slope for each in rounds)
            boundary = statistics.median(each.boundary for each in rounds)
            # Where cuts are drawn anew the encoder may be the limit of short epochs: that figure is there to be read.
            most = None if redrawn else MOST_BOUNDARY
            told = [
                Figure(f"memory, {way}", slope, "KiB/step", at_most=MOST_SLOPE),
                Figure(f"first step of an epoch, {way}", boundary, "of another step", at_most=most),
            ]
            print(table(told), file=sys.stderr, flush=True)  # a way takes minutes
            figures += told
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
