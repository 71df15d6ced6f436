"""Base models as they were published: settings files that leave much out, and those of models that are none of ours inside."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.config.options import ObjectiveOptions
from helpers.errors import ConfigError, ModelError
from helpers.objectives import OBJECTIVES
from tests.families.conftest import CPU, PIXELS, Tried, open_family

# As they stand in Stable Diffusion 1.4, but for the sizes of the VAE.
FIRST_VAE = {
    "_class_name": "FlaxAutoencoderKL",
    "_diffusers_version": "0.5.0.dev0",
    "act_fn": "silu",
    "in_channels": 3,
    "latent_channels": 4,
}
FIRST_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.4.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SIZES_OF_A_VAE = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups")
PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def copy(miniature: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a miniature, whose settings may be changed."""
    return lambda name: shutil.copytree(miniature(name), tmp_path / "model")


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")


def bare(source: Path, target: Path) -> Path:
    """A copy of a model whose settings files leave out whatever their classes have by default."""
    shutil.copytree(source, target)
    for path in (*target.glob("*/config.json"), *target.glob("*/scheduler_config.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if kind := settings.get("_class_name"):
            parameters = inspect.signature(getattr(diffusers, kind)).parameters
            defaults: dict[str, Any] = {name: parameter.default for name, parameter in parameters.items()}
        else:
            defaults = CONFIG_MAPPING[settings["model_type"]]().to_dict()
        plain = json.loads(json.dumps(defaults, default=str))  # tuples as lists
        kept = {name: value for name, value in settings.items() if name == "model_type" or name not in plain or plain[name] != value}
        assert len(kept) < len(settings)
        path.write_text(json.dumps(kept), encoding="utf-8")
    return target


def test_settings_that_are_left_out_are_those_of_the_class(tried: Tried, tmp_path: Path) -> None:
    family = open_family(tried.family.facts.name, bare(tried.folder, tmp_path / "bare"), tmp_path / "cache")
    assert family.latents == tried.family.latents
    assert family.scheduler_config == tried.family.scheduler_config
    with family.text_encoders(CPU) as encoders, tried.family.text_encoders(CPU) as expected:
        ours, theirs = encoders.encode(["a cat"]), expected.encode(["a cat"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if tried.miniature in PIXELS:
        return
    with family.image_codec(CPU) as codec, tried.family.image_codec(CPU) as whole:
        assert torch.equal(codec.encode(PICTURE)["mean"], whole.encode(PICTURE)["mean"])


def test_the_first_stable_diffusion_is_read_as_it_was_trained(copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy("sd1")
    sizes = {name: value for name, value in json.loads((model / "vae" / "config.json").read_text()).items() if name in SIZES_OF_A_VAE}
    (model / "vae" / "config.json").write_text(json.dumps({**FIRST_VAE, **sizes}))
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(FIRST_SCHEDULER))
    family = open_family("sd2x", model, tmp_path / "cache")
    with family.image_codec(CPU) as codec:
        latents = codec.encode(PICTURE)["mean"]
        vae = diffusers.AutoencoderKL.from_pretrained(model / "vae")
        torch.testing.assert_close(latents, vae.encode(PICTURE).latent_dist.mean.detach() * 0.18215)
    assert family.scheduler_config["prediction_type"] == "epsilon"


def test_latents_are_normalised_by_channel_where_the_vae_says_so(copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy("sdxl")
    change(model / "vae" / "config.json", scaling_factor=0.5, latents_mean=[-1.6, 1.1, 0.4, -0.1], latents_std=[8.4, 5.9, 5.2, 5.4])
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(model)
    latents = pipeline.prepare_latents(PICTURE, None, 1, 1, torch.float32, CPU, torch.Generator(), add_noise=False)
    noise = torch.randn(latents.shape, generator=torch.Generator())  # the pipeline takes a sample of what the VAE gives
    posterior = pipeline.vae.encode(PICTURE).latent_dist
    with open_family("sdxl", model, tmp_path / "cache", latent_sampling="sample").image_codec(CPU) as codec:
        encoded = codec.encode(PICTURE)
        torch.testing.assert_close(encoded["mean"] + encoded["std"] * noise, latents)
        torch.testing.assert_close(codec.decode(encoded["mean"]), pipeline.vae.decode(posterior.mean).sample.detach().clamp(-1, 1))


@pytest.mark.parametrize("scheduler", [diffusers.EDMDPMSolverMultistepScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_a_model_of_another_schedule_is_not_trained_as_diffusion(scheduler: Any, copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy("sdxl")
    (model / "scheduler" / "scheduler_config.json").unlink()
    scheduler().save_pretrained(model / "scheduler")
    family = open_family("sdxl", model, tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"The model's scheduler, {scheduler.__name__}, has no betas"):
        OBJECTIVES["diffusion"](ObjectiveOptions(), family.scheduler_config)


def test_a_network_that_sees_more_than_latents_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy("sd1")
    change(model / "unet" / "config.json", in_channels=9)
    with pytest.raises(ModelError, match="reads 9 channels, and its VAE makes 4: .* inpainting"):
        open_family("sd2x", model, tmp_path / "cache")


def test_a_vae_of_another_kind_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    small.save_pretrained(tmp_path / "taesd")
    with pytest.raises(ModelError, match="--pretrained_vae_model_name_or_path: .* holds an AutoencoderTiny, and only an AutoencoderKL"):
        open_family("sd2x", copy("sd1"), tmp_path / "cache", pretrained_vae_model_name_or_path=str(tmp_path / "taesd"))
