"""Miniature runs in this process, a quarter of a second each, whose state a fault may be put into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.read import read_config
from helpers.families.miniatures.sdxl import write_sdxl
from tests.harness import NO_VALIDATION, Ended, Trainer, draw_images, run_here


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("model") / "model")


@dataclass
class Miniature:
    """A trainer whose runs happen in this process. What a run raises is raised here."""

    trainer: Trainer

    @property
    def output(self) -> Path:
        return self.trainer.folder / "out"

    def run(self, output: str = "out", **settings: object) -> Ended:
        if not (self.trainer.folder / "dataloader.json").exists():
            self.trainer.dataloader()
        flags = self.trainer.flags(self.trainer.folder / output, **settings)
        return run_here(read_config(flags, {}, known_axes()))


@pytest.fixture
def small(tmp_path: Path, miniature: Path) -> Miniature:
    """A LoRA of a random SDXL on four images, with nothing random, and without validation."""
    settings = {**NO_VALIDATION, "train_batch_size": 2, "gradient_accumulation_steps": 1, "use_ema": False, "seed": 1, "max_train_steps": 4}
    return Miniature(Trainer(draw_images(tmp_path / "images", 4), tmp_path, miniature, settings))


Stop = Callable[[], None]


@pytest.fixture
def ask_to_stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Asks the next run of this process to stop, as a signal does."""
    from helpers.training.stopping import StopRequest

    requests: list[StopRequest] = []

    def new_request() -> StopRequest:
        requests.append(StopRequest())
        return requests[-1]

    monkeypatch.setattr("helpers.training.stopping.StopRequest", new_request)
    return lambda: setattr(requests[-1], "asked", True)
