"""Validation pictures that begin with pictures, against the pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from helpers.choices import known_axes
from helpers.config.facts import family_problems
from helpers.families.networks.samplers import sampler
from helpers.families.tiny import MINIATURES
from tests.families.conftest import CPU, Tried, family_name

OPTIONS = known_axes().options

ASKED = ("sd1", "sd2", "sdxl", "sd3", "sd35")  # miniatures of families that begin with pictures when they are asked to


def test_these_are_all() -> None:
    facts = known_axes().families
    refining = {"sdxl_refiner", "deepfloyd_2"}  # which have no other pictures; see their own tests
    of_pixels = {"deepfloyd_1"}  # see its own tests
    assert {name for name in MINIATURES if facts[family_name(name)].img2img} == {*ASKED, *refining, *of_pixels}


@pytest.mark.parametrize("tried", ASKED, indirect=True)
def test_pictures_from_pictures_are_those_that_the_pipeline_makes_of_the_words(tried: Tried) -> None:
    """The expected side: the pipeline of diffusers with its own encoders, given the same latents."""
    without: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if tried.miniature == "sd35" else {}
    whole: Any = AutoPipelineForImage2Image.from_pretrained(tried.folder, **without)
    objective = tried.objective()
    schedule = sampler(objective.samplers["euler"], objective.scheduler_config, "trailing")
    whole.scheduler = schedule
    denoiser = (whole.unet if hasattr(whole, "unet") else whole.transformer).eval()
    ours = tried.family.img2img_pipeline(denoiser, sampler(objective.samplers["euler"], objective.scheduler_config, "trailing"))
    for pipeline in (whole, ours):
        pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, tried.family.latents.channels, 12, 8, generator=torch.Generator().manual_seed(4))
    with tried.family.text_encoders(CPU) as encoders:
        text, negative = ({name: tensor[0] for name, tensor in encoders.encode([caption]).items()} for caption in ("a cat", "blurry"))
    usual: dict[str, Any] = {"guidance_scale": 5.0, "output_type": "latent"}
    begins = tried.family.img2img_arguments(latents, 10, 0.4)
    found = ours(**tried.family.prompt_arguments(text, negative), **begins, **usual, generator=torch.Generator().manual_seed(1)).images
    size = {"width": 64, "height": 96} if tried.miniature in ("sd3", "sd35") else {}
    expected = whole(
        "a cat",
        image=latents,
        negative_prompt="blurry",
        strength=0.4,
        num_inference_steps=10,
        **size,
        **usual,
        generator=torch.Generator().manual_seed(1),
    ).images
    assert found.shape == latents.shape
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, latents, atol=1e-2)


@pytest.mark.parametrize("tried", ["sdxl"], indirect=True)
def test_a_share_of_the_schedule_has_at_least_one_step(tried: Tried) -> None:
    assert tried.family.img2img_arguments(torch.zeros(1, 4, 8, 8), 2, 0.2)["num_inference_steps"] == 5


def test_what_the_pipelines_cannot_do_is_refused() -> None:
    usual = {**{name: item.default for name, item in OPTIONS.items()}, "validation_using_datasets": True}
    families = known_axes().families
    assert {name for name, facts in families.items() if list(family_problems(facts, {**usual, **facts.defaults}))} == {
        "pixart_alpha",
        "pixart_sigma",
        "hunyuan_dit",
        "flux",
    }
    rescaled = {**usual, "validation_guidance_rescale": 0.7}
    assert list(family_problems(families["sdxl"], rescaled)) == []
    assert "cannot be combined with --validation_guidance_rescale" in "\n".join(family_problems(families["sd2x"], rescaled))
