"""Complete runs, as users have them: real processes, a miniature SDXL, a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Ended, Trainer, draw_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def trainer(images: Path, tmp_path: Path) -> Trainer:
    return Trainer(images, tmp_path)


@pytest.fixture(scope="session")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shared_cache(trainer: Trainer, filled_cache: Path) -> None:
    """Runs of this test find the images encoded by those of earlier ones: for tests of what comes after."""
    trainer.settings = {**trainer.settings, "cache_dir": filled_cache}


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One undisturbed run that many tests look at."""
    return Trainer(images, tmp_path_factory.mktemp("finished")).finish()
