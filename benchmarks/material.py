"""Material for the benchmarks: photograph-like images, a model, and the settings of a run on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.reporting import Reporters
from helpers.setup.model import choose_axes
from helpers.setup.run import Run, StartPoint
from helpers.training.checkpoints import Checkpointer
from helpers.training.runtime import Runtime
from helpers.training.state import TrainState

SUBJECTS = ("cat", "dog", "house", "tree", "flower", "street", "person", "sea")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")


def write_photographs(folder: Path, count: int, size: tuple[int, int] = (1200, 800)) -> Path:
    """Camera-like JPEGs: soft shapes with some grain, all different, each with a caption file."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3)).astype(np.float32)
    for index in range(count):
        cells = np.random.default_rng(index).integers(0, 256, (12, 18, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        path = folder / f"photograph_{index:06}.jpg"
        Image.fromarray((soft + np.roll(grain, index, axis=1)).clip(0, 255).astype(np.uint8)).save(path, quality=88)
        path.with_suffix(".txt").write_text(caption(index), encoding="utf-8")
    return folder


def caption(index: int) -> str:
    """A caption of typical length, different for each index."""
    subject, color = SUBJECTS[index % 8], COLORS[index // 8 % 8]
    return f"a photo of the {color} {subject} in the street, image {index}, with a white house and a large tree in the background"


def run_settings(folder: Path, model: Path, images: Path, resolution: int, **changed: object) -> Config:
    """The settings of a run, read from flags and a dataloader JSON like a user's. All output goes to `folder`."""
    dataset = {
        "id": "photographs",
        "type": "local",
        "instance_data_dir": str(images),
        "resolution": resolution,
        "resolution_type": "pixel",
        "caption_strategy": "textfile",
    }
    folder.mkdir(parents=True, exist_ok=True)
    dataloader = folder / "dataloader.json"
    dataloader.write_text(json.dumps([dataset]), encoding="utf-8")
    return read_config(run_flags(folder, model, **changed), {}, known_axes())


def run_flags(folder: Path, model: Path, **changed: object) -> list[str]:
    """The flags of a run whose datasets are in `folder`/dataloader.json."""
    settings: dict[str, object] = {
        "pretrained_model_name_or_path": model,
        "data_backend_config": folder / "dataloader.json",
        "output_dir": folder / "output",
        "seed": 1,
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "report_to": "none",
        "max_train_steps": 1,
        "num_train_epochs": 0,
        **changed,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def new_run(config: Config, runtime: Runtime) -> Run:
    """A run at its first step, without reporters."""
    start = StartPoint(None, TrainState(seed=1), 1, Checkpointer(config.checkpoints, config.run.output_dir))
    return Run(config, runtime, Reporters(), *choose_axes(config), start)
