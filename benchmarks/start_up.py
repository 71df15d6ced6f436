"""Where a warm start spends its time until the first batch, and how fast `--help` and a mistake are answered.

    python -m benchmarks.start_up [--images 10000] [--rounds 5]

Everything is cached first. Then a new process goes through the start of train.py, stage by stage. Python's `-X importtime` gives the time
to import each library (each library's own modules only). `--profile` lists more of the libraries.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.material import caption, run_flags, run_settings
from benchmarks.measure import Figure, conclude, parser

ROOT = Path(__file__).resolve().parent.parent
MOST_ANSWER = 1.0  # seconds to `--help`, or to the message about a mistake
LEAST_IMPORTS = 0.5  # imports must take at least this share of the time to the first batch
MOST_OURS = 0.5  # seconds from the scan to the first batch with 10,000 images, without imports and model
LIBRARIES = 6  # libraries listed, the slowest first

# Starts like train.py and prints the time of each stage. It is a program of its own, so that nothing is imported before.
STAGES = """
import gc, json, sys, time
gc.disable()
began = time.perf_counter()
took = {}
def stage(name):
    global began
    now = time.perf_counter()
    took[name] = now - began
    began = now

from helpers.choices import known_axes
from helpers.config.read import read_config
config = read_config(sys.argv[1:], {}, known_axes())
stage("settings")

from helpers.data.prepare import prepare_data
from helpers.reporting import Reporters
from helpers.reporting.console import Console
from helpers.setup.datasets import data_settings, workers
from helpers.setup.model import choose_axes
from helpers.setup.run import Run, StartPoint
from helpers.training.checkpoints import Checkpointer
from helpers.training.engine import Engine
from helpers.training.runtime import start_runtime
from helpers.training.checkpoints import Checkpointer
from helpers.training.schedules import Schedule
from helpers.training.state import TrainState
from helpers.training.stopping import StopRequest
from helpers.training.validation import Validator
from diffusers import UNet2DConditionModel
import peft
stage("imports")

with start_runtime(config.run, config.cache.cache_dir, config.given, StopRequest()) as runtime:
    family, method, objective = choose_axes(config)
    gc.freeze()
    gc.enable()
    stage("runtime and choices")
    start = StartPoint(None, TrainState(seed=1), 1, Checkpointer(config.checkpoints, config.run.output_dir))
    settings = data_settings(Run(config, runtime, Reporters(), family, method, objective, start))
    data = prepare_data(config.datasets, settings, family, workers(runtime), Reporters())
    stage("data")
    optimizer = config.replaced("settled", optimizer="adamw").optimizer
    trainable = method.attach(family.load(method.weights_dtype("no", "adamw")))
    engine = Engine(runtime, trainable, optimizer, Schedule.create(config.schedule, 1))
    stage("model")
    next(data.steps(0, 1))
    stage("first batch")
    print(json.dumps([time.time(), took]))
"""


def write_thumbnails(folder: Path, count: int) -> Path:
    """Small different JPEGs, many with the same caption. Encoding time is not measured here."""
    folder.mkdir(parents=True)
    for index in range(count):
        color = (index % 256, index // 256 % 256, 128)
        path = folder / f"thumbnail_{index:06}.jpg"
        Image.new("RGB", (64, 64), color).save(path)
        path.with_suffix(".txt").write_text(caption(index % 100), encoding="utf-8")
    return folder


def imports(said: str) -> dict[str, float]:
    """Import seconds by library, from the output of `-X importtime`; our own code is "helpers" and "train"."""
    seconds: dict[str, float] = defaultdict(float)
    for line in re.finditer(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", said, re.MULTILINE):
        library = line[2].partition(".")[0]
        seconds["standard library" if library in sys.stdlib_module_names else library] += int(line[1]) / 1e6
    return seconds


def start(flags: Sequence[str]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds of a process until its first batch: in total, by stage, and for imports by library."""
    command = [sys.executable, "-X", "importtime", "-c", STAGES, *flags]
    began = time.time()  # wall-clock time, which both processes share
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    ended, stages = json.loads(done.stdout.splitlines()[-1])
    return ended - began, stages, imports(done.stderr)


def answer(*arguments: str, code: int) -> float:
    """Seconds until `train.py` has printed its answer and exited with this exit code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert done.returncode == code, done.stderr
    return seconds


def run_of_thumbnails(folder: Path, images: int) -> list[str]:
    """Write a model and images => the flags of a run on them."""
    from helpers.families.miniatures.sdxl import write_sdxl

    model = write_sdxl(folder / "model")
    run_settings(folder, model, write_thumbnails(folder / "images", images), 64)
    return run_flags(folder, model, max_train_steps=1)


def cached_run(folder: Path, images: int) -> list[str]:
    """The same after a first start, in a process of its own, which caches everything."""
    flags = run_of_thumbnails(folder, images)
    start(flags)
    return flags


def middle(rounds: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(each.get(name, 0.0) for each in rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=10_000)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        flags = cached_run(Path(place), chosen.images)
        rounds = [(start(flags), answer("--help", code=0), answer(*flags, "--learning_rte=1", code=2)) for _ in range(chosen.rounds)]
    starts, helps, mistakes = zip(*rounds, strict=True)
    totals, stages, libraries = zip(*starts, strict=True)
    whole = statistics.median(totals)
    share = statistics.median(each["imports"] / total for total, each in zip(totals, stages, strict=True))
    ours = statistics.median(each["data"] + each["first batch"] for each in stages)
    slowest = sorted({name for each in libraries for name in each}, key=lambda name: -middle(libraries, name))
    figures = [
        Figure("warm start to first batch", whole, "s"),
        *(Figure(f"  {stage}", middle(stages, stage), "s") for stage in stages[0]),
        *(Figure(f"    import {name}", middle(libraries, name), "s") for name in slowest[: LIBRARIES * (3 if chosen.profile else 1)]),
        Figure("share of library imports", share, "", at_least=LEAST_IMPORTS),
        Figure(f"data and first batch, {chosen.images:,} images", ours, "s", at_most=MOST_OURS),
        Figure("train.py --help", statistics.median(helps), "s", at_most=MOST_ANSWER),
        Figure("a mistake in the settings", statistics.median(mistakes), "s", at_most=MOST_ANSWER),
    ]
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
