"""The quick starts followed step by step, as their reader would, on miniatures and three photographs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.documentation.pages import ROOT, Page
from tests.warm_python import warm_python

PHOTOGRAPHS = ("coffee.jpg", "cat.webp", "camera.png")
SDXL_ON_THE_HUB = "stabilityai/stable-diffusion-xl-base-1.0"
REFINER_ON_THE_HUB = "stabilityai/stable-diffusion-xl-refiner-1.0"
SD3_ON_THE_HUB = "stabilityai/stable-diffusion-3.5-medium"
FLUX_ON_THE_HUB = "black-forest-labs/FLUX.1-dev"
SD2_ON_THE_HUB = "stabilityai/stable-diffusion-2-1"
HUNYUAN_ON_THE_HUB = "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"
IF_ONE_ON_THE_HUB = "DeepFloyd/IF-I-XL-v1.0"
IF_TWO_ON_THE_HUB = "DeepFloyd/IF-II-L-v1.0"
SIGMA_ON_THE_HUB = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
# What makes the run of a page last seconds.
SMALL = (
    "--resolution_type=pixel --resolution=64 --max_train_steps=2 --gradient_accumulation_steps=1 --lr_warmup_steps=0"
    " --validation_num_inference_steps=2 --train_batch_size=2"
)


@dataclass(frozen=True)
class Reader:
    """Someone who follows a page in a folder that looks like a clone, with a folder of their own instead of /home/user."""

    clone: Path
    home: Path
    models: Mapping[str, Path]  # by their names on the hub
    python: str
    settings: str = "sdxl-env.sh"

    def own(self, text: str) -> str:
        """Text of a page with the reader's folder and models in it."""
        text = text.replace("/home/user", str(self.home))
        for name, folder in self.models.items():
            text = text.replace(name, str(folder))
        return text

    def type(self, commands: str) -> str:
        """Run shell commands in the clone, a wrapper for seconds only; returns what they said, insisting on exit code 0."""
        small = re.sub(r"^\./train_\w+\.sh", rf"\g<0> {SMALL}", self.own(commands), flags=re.MULTILINE)
        environ = {**os.environ, "SIMPLETUNER_PYTHON": self.python}
        ended = subprocess.run(
            ["bash", "-ec", small], cwd=self.clone, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    def edit(self, settings: str) -> None:
        """Put the settings of a page into the env file, in the lines where they stand already."""
        file = self.clone / self.settings
        lines = file.read_text(encoding="utf-8").splitlines()
        for line in self.own(settings).splitlines():
            name = line.partition("=")[0]
            [place] = [number for number, old in enumerate(lines) if old.startswith(f"{name}=")]
            lines[place] = line
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def new_reader(folder: Path, models: Mapping[str, Path], pictures: str, settings: str = "sdxl-env.sh") -> Reader:
    clone, home = folder / "clone", folder / "home"
    clone.mkdir(parents=True)
    for name in (*(path.name for path in [*ROOT.glob("train_*.sh"), *ROOT.glob("*-env.sh.example")]), "simpletuner"):
        (clone / name).symlink_to(ROOT / name)
    (home / pictures).mkdir(parents=True)
    for name in PHOTOGRAPHS:
        for file in (name, Path(name).with_suffix(".txt").name):
            shutil.copy(ROOT / "demo" / "photos" / file, home / pictures)
    return Reader(clone, home, models, warm_python(), settings)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Miniatures in place of the models that the pages name."""
    from helpers.families.miniatures import deepfloyd as tiny_deepfloyd
    from helpers.families.miniatures import flux as tiny_flux
    from helpers.families.miniatures import hunyuan_dit as tiny_hunyuan
    from helpers.families.miniatures import pixart as tiny_pixart
    from helpers.families.miniatures import sd as tiny_sd
    from helpers.families.miniatures import sd3 as tiny_sd3
    from helpers.families.miniatures import sdxl as tiny_sdxl

    folder = tmp_path_factory.mktemp("models")
    return {
        SDXL_ON_THE_HUB: tiny_sdxl.write_sdxl(folder / "sdxl"),
        REFINER_ON_THE_HUB: tiny_sd.write_sdxl_refiner(folder / "refiner"),
        SD3_ON_THE_HUB: tiny_sd3.write_sd3(folder / "sd3"),
        FLUX_ON_THE_HUB: tiny_flux.write_dev(folder / "flux"),
        SD2_ON_THE_HUB: tiny_sd.write_sd2(folder / "sd2"),
        HUNYUAN_ON_THE_HUB: tiny_hunyuan.write_hunyuan_dit(folder / "hunyuan"),
        IF_ONE_ON_THE_HUB: tiny_deepfloyd.write_deepfloyd_1(folder / "if_one"),
        IF_TWO_ON_THE_HUB: tiny_deepfloyd.write_deepfloyd_2(folder / "if_two"),
        SIGMA_ON_THE_HUB: tiny_pixart.write_pixart_sigma(folder / "sigma"),
    }


def in_two_steps(sample: str) -> str:
    """A page's Python, whose one call `pipeline("PROMPT"...)` samples in 2 steps instead of 30 or 50."""
    short, count = re.subn(r'pipeline\(("[^"]+")', r"pipeline(\1, num_inference_steps=2", sample)
    assert count == 1, sample
    return short


@dataclass(frozen=True)
class Followed:
    """The quick start after its training."""

    reader: Reader
    output: Path
    said: str


@pytest.fixture(scope="session")
def quick_start(models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Followed:
    page = Page.named("documentation/QUICKSTART.md")
    reader = new_reader(tmp_path_factory.mktemp("quickstart"), models, "training/images")
    datasets = reader.home / "training" / "multidatabackend.json"
    assert f"`/home/user/training/{datasets.name}`" in page.text
    datasets.write_text(reader.own(page.section("2. ").block("json")), encoding="utf-8")
    copy, settings = (block.text for block in page.section("3. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    said = reader.type(page.section("4. ").block("bash"))
    return Followed(reader, reader.home / "training" / "models", said)


@pytest.fixture
def finished_report(quick_start: Followed) -> dict[str, Any]:
    """The report on the quick start's one dataset."""
    [entry] = json.loads((quick_start.output / "dataset_report.json").read_text(encoding="utf-8"))["datasets"]
    return entry
