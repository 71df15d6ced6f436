"""A miniature of every family, and batches for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.choices import known_axes
from helpers.config.options import CacheOptions, ModelOptions, ObjectiveOptions
from helpers.data.base.draws import StepDraws
from helpers.data.base.sample import Geometry, Size
from helpers.data.batches import Batch
from helpers.families import FAMILIES, family_facts
from helpers.families.tiny import MINIATURES
from helpers.objectives import OBJECTIVES
from helpers.protocols import ModelFamily, Objective

CPU = torch.device("cpu")
EXPECTED = {miniature.name: miniature for facts in family_facts().values() for miniature in facts.miniatures}
FAMILY_OF = {miniature.name: facts.name for facts in family_facts().values() for miniature in facts.miniatures}
CAPTIONS = ("a red circle", "a photo of a cat on the sea", "", "blue square")
GEOMETRY = Geometry(Size(1920, 1157), Size(1394, 840), top=36, left=25, target=Size(1344, 768))


@dataclass(frozen=True)
class Tried:
    """A miniature, opened as its family."""

    miniature: str
    folder: Path
    family: ModelFamily

    def objective(self, **options: Any) -> Objective:
        """What the family's networks are asked."""
        known = {field.name for field in dataclasses.fields(ObjectiveOptions)}
        defaults = {name: value for name, value in self.family.facts.defaults.items() if name in known}
        chosen = dataclasses.replace(ObjectiveOptions(), **{**defaults, **options})
        return OBJECTIVES[self.family.facts.objective](chosen, self.family.scheduler_config, self.family.latents.patch)

    def batch(self, captions: Sequence[str] = CAPTIONS, step: int = 3) -> Batch:
        """Fixed latents of 8 x 8 under the captions, all with GEOMETRY."""
        latents = torch.randn(len(captions), self.family.latents.channels, 8, 8, generator=torch.Generator().manual_seed(5))
        with self.family.text_encoders(CPU) as encoders:
            text = encoders.encode(captions)
        return Batch(
            latents=latents,
            text=text,
            captions=tuple(captions),
            samples=(),
            geometry=(GEOMETRY,) * len(captions),
            loss_weight=torch.ones(len(captions)),
            draws=StepDraws(seed=11, step=step, places=tuple(range(len(captions))), step_samples=len(captions)),
            epoch=0,
        )


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a miniature by its name, written when first asked for."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = MINIATURES[name](tmp_path_factory.mktemp("miniature") / name)
        return written[name]

    return folder


def open_family(name: str, model: Path, cache: Path, **options: Any) -> ModelFamily:
    """The family of a registry's name on a model folder, with its defaults; `options` are of the model, the caches and families."""
    values = {**FAMILIES[name].facts.defaults, "pretrained_model_name_or_path": str(model), "cache_dir": cache, **options}

    def changed(section: Any) -> Any:
        names = [field.name for field in dataclasses.fields(section) if field.name in values]
        return dataclasses.replace(section, **{name: values[name] for name in names})

    own = tuple(changed(section()) for section in known_axes().family_sections)
    return FAMILIES[name](dataclasses.replace(changed(ModelOptions()), family_sections=own), changed(CacheOptions()))


def family_name(miniature: str) -> str:
    """The registry's name of a miniature's family."""
    return FAMILY_OF[miniature]


def miniatures_of(wanted: Callable[[Any], bool]) -> tuple[str, ...]:
    """The miniatures of the families whose class fulfils a condition."""
    return tuple(name for name in MINIATURES if wanted(FAMILIES[family_name(name)]))


CLIP_ALONE = miniatures_of(lambda family: "long_captions" in family.facts.options)  # they predict noise or velocity, and read CLIP
PEFT_ALONE = miniatures_of(lambda family: not family.loads_lora)  # those whose pipelines have no loader for LoRA files
PIXELS = miniatures_of(lambda family: hasattr(family, "latents"))  # without a VAE: latents are known before a base model is open


@pytest.fixture(params=MINIATURES)
def tried(request: pytest.FixtureRequest, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    """Each family in turn."""
    folder = miniature(request.param)
    return Tried(request.param, folder, open_family(family_name(request.param), folder, tmp_path / "cache"))
