"""Whole runs, as users have them: real processes, a miniature SDXL, a folder of pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(64, 64), (96, 64), (64, 96), (160, 80)]


@pytest.fixture(scope="session")
def model() -> Path:
    """The embedded default: a true SDXL whose pictures mean something, and which a run may not change."""
    return ROOT / "demo" / "model"


def draw_pictures(folder: Path, count: int = 14) -> Path:
    """Discs on plain grounds in four shapes, captioned by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        image = Image.new("RGB", (width, height), (number * 17 % 256, number * 53 % 256, number * 101 % 256))
        ImageDraw.Draw(image).ellipse((8, 8, 48, 48), fill=(number * 71 % 256, 255 - number * 13 % 256, number * 29 % 256))
        image.save(folder / f"a_red_circle_{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    code: int
    said: str
    folder: Path

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows("metrics.jsonl")]


@dataclass
class Trainer:
    """Starts `train.py` (or a wrapper) on the miniature, with everything random switched on; flags of a test win."""

    model: Path
    pictures: Path
    folder: Path
    settings: dict[str, object] = field(default_factory=dict)
    wrapper: str = ""  # "train_sdxl.sh" starts runs as users do

    def dataloader(self, **keys: object) -> Path:
        entry = {
            "id": "pictures",
            "type": "local",
            "instance_data_dir": str(self.pictures),
            "resolution": 64,
            "resolution_type": "pixel",
            "caption_strategy": "filename",
            "crop": True,
            "crop_style": "random",
            "crop_aspect": "preserve",
            "flip": True,
            **keys,
        }
        path = self.folder / "dataloader.json"
        path.write_text(json.dumps([entry]), encoding="utf-8")
        return path

    def flags(self, output: Path, **settings: object) -> list[str]:
        values: dict[str, object] = {
            "pretrained_model_name_or_path": self.model,
            "data_backend_config": self.folder / "dataloader.json",
            "output_dir": output,
            "model_type": "lora",
            "max_train_steps": 6,
            "num_train_epochs": 0,
            "checkpointing_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "caption_dropout_probability": 0.3,
            "lora_dropout": 0.2,
            "validation_prompt": "a red circle",
            "validation_steps": 4,
            "validation_num_inference_steps": 2,
            "record_samples": True,
            "use_ema": True,
            "report_to": "none",
            **self.settings,
            **settings,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    def start(
        self, output: str = "out", *, environ: Mapping[str, str] | None = None, command: Sequence[str] = (), **settings: object
    ) -> subprocess.Popen[str]:
        if not (self.folder / "dataloader.json").exists():
            self.dataloader()
        program = ["bash", str(ROOT / self.wrapper)] if self.wrapper else [*(command or [sys.executable]), str(ROOT / "train.py")]
        settings_file = self.folder / "empty-env.sh"
        settings_file.touch()
        environment = {**os.environ, "ENV_FILE": str(settings_file), "SIMPLETUNER_PYTHON": sys.executable, **(environ or {})}
        return subprocess.Popen(
            [*program, *self.flags(self.folder / output, **settings)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, output: str = "out", **settings: Any) -> Ended:
        process = self.start(output, **settings)
        said, _ = process.communicate(timeout=300)
        return Ended(process.returncode, said, self.folder / output)

    def finish(self, output: str = "out", **settings: Any) -> Ended:
        """Run, and insist that it went well."""
        ended = self.run(output, **settings)
        assert ended.code == 0, ended.said
        return ended


@pytest.fixture
def trainer(model: Path, pictures: Path, tmp_path: Path) -> Trainer:
    return Trainer(model, pictures, tmp_path)


@pytest.fixture(scope="session")
def finished(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One undisturbed run that many tests look at."""
    return Trainer(model, pictures, tmp_path_factory.mktemp("finished")).finish()


@pytest.fixture
def same_weights() -> Callable[[Ended, Ended], bool]:
    """Whether two runs ended in the same bytes: weights, average, optimiser."""

    def compare(one: Ended, other: Ended) -> bool:
        [*_, last] = sorted(one.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        names = [path.name for path in last.glob("*.safetensors")]
        assert len(names) >= 3
        return all((last / name).read_bytes() == (other.folder / last.name / name).read_bytes() for name in names)

    return compare
