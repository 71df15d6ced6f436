"""DeepFloyd IF: pixels in place of latents, what is trained of the answer, and what stage II is shown.

The expected side knows torch, diffusers and the numbers written here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

import train
from helpers.choices import known_axes
from helpers.config.options import AdapterOptions, ObjectiveOptions
from helpers.config.read import read_config
from helpers.data.base.draws import StepDraws
from helpers.data.encode.common import stored
from helpers.errors import ConfigError
from helpers.families.deepfloyd import quarter
from helpers.methods.full import FullFineTune
from helpers.objectives.diffusion import Diffusion
from helpers.training.validation import parse_sizes
from tests.families.conftest import CAPTIONS, CPU, PIXELS, Tried, open_family
from tests.families.other_losses import other_losses

LONG = "a photo of a cat " * 30


@pytest.fixture(params=PIXELS)
def deepfloyd(request: pytest.FixtureRequest, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    return _tried(request.param, miniature, tmp_path)


@pytest.fixture
def stage_two(miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    return _tried("deepfloyd_2", miniature, tmp_path)


def _tried(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    return Tried(name, miniature(name), open_family(name, miniature(name), tmp_path / "cache"))


def smaller_and_larger_again(pixels: Tensor) -> Tensor:
    """A quarter of each picture, as large as it was."""
    small = torch.nn.functional.interpolate(pixels, scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)
    return torch.nn.functional.interpolate(small, pixels.shape[2:], mode="bilinear", align_corners=True)


def question(tried: Tried, noisy: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the network is shown, and what it is told besides time and text: stage II a noisy smaller picture, and how noisy that is."""
    if tried.miniature == "deepfloyd_1":
        return noisy, {}
    batch = tried.batch()
    levels = tried.family.conditioning(batch, CPU)["image_noise_level"]
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas
    signal = torch.cumprod(1 - betas, dim=0)[levels].view(-1, 1, 1, 1)
    noise = batch.draws.normal("image_noise", *noisy.shape[1:])
    image = signal.sqrt() * smaller_and_larger_again(batch.latents) + (1 - signal).sqrt() * noise
    return torch.cat((noisy, image), dim=1), {"class_labels": levels}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_target_and_loss_are_those_of_diffusers(deepfloyd: Tried, prediction: str) -> None:
    objective = Diffusion(ObjectiveOptions(prediction_type=prediction), deepfloyd.family.scheduler_config)
    batch = deepfloyd.batch()
    with torch.no_grad():
        losses, corrupted = train.train_step(deepfloyd.family, objective, deepfloyd.family.load(torch.float32).denoiser, batch, CPU)

    pipeline: Any = DiffusionPipeline.from_pretrained(deepfloyd.folder)
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    noise, timesteps = batch.draws.normal("noise", *batch.latents.shape[1:]), corrupted.timesteps
    noisy = pipeline.scheduler.add_noise(batch.latents, noise, timesteps)
    velocity = pipeline.scheduler.get_velocity(batch.latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": batch.latents}[prediction]
    shown, told = question(deepfloyd, noisy)
    with torch.no_grad():
        text = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False, device=CPU)[0]
        predicted = pipeline.unet(shown, timesteps, text, **told).sample[:, :3]
    assert torch.allclose(corrupted.noisy, noisy, atol=1e-5)
    assert torch.allclose(corrupted.target, target, atol=1e-5)
    assert torch.allclose(losses, ((predicted - target) ** 2).mean(dim=(1, 2, 3)), rtol=1e-5)
    for ours, expected in other_losses(deepfloyd, batch, prediction, predicted, target, pipeline.scheduler.alphas_cumprod[timesteps]):
        assert torch.allclose(ours, expected, rtol=1e-4)


def test_captions_are_encoded_as_the_pipeline_encodes_them(deepfloyd: Tried) -> None:
    captions = [*CAPTIONS, LONG, "  A Red CIRCLE "]
    pipeline: Any = DiffusionPipeline.from_pretrained(deepfloyd.folder)
    with deepfloyd.family.text_encoders(CPU) as encoders, torch.no_grad():
        ours, dropped = encoders.encode(captions), deepfloyd.family.unconditional(encoders)
        assert encoders.truncated == 1
        theirs = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, device=CPU)[0]
        negative = pipeline.encode_prompt("a cat", do_classifier_free_guidance=True, device=CPU)[1]
    assert list(ours) == ["prompt_embeds"] and ours["prompt_embeds"].shape[1] == 77
    assert torch.allclose(ours["prompt_embeds"], theirs, atol=1e-5)
    assert torch.allclose(dropped["prompt_embeds"], negative[0], atol=1e-5)
    lengths = deepfloyd.family.caption_lengths()
    assert lengths.token_counts(captions)[-1] == lengths.token_counts(["a red circle"])[0]


def test_the_network_attends_to_the_states_of_the_padding(deepfloyd: Tried) -> None:
    batch, objective = deepfloyd.batch(["a red circle"]), deepfloyd.objective()
    denoiser = deepfloyd.family.load(torch.float32).denoiser.eval()

    def loss() -> Tensor:
        with torch.no_grad():
            return train.train_step(deepfloyd.family, objective, denoiser, batch, CPU)[0]

    before = loss()
    batch.text["prompt_embeds"][:, -1] += 10
    assert not torch.allclose(loss(), before, rtol=1e-4)


def test_the_channels_of_the_variance_are_not_trained_and_do_not_count(deepfloyd: Tried) -> None:
    denoiser = deepfloyd.family.load(torch.float32).denoiser
    losses = train.train_step(deepfloyd.family, deepfloyd.objective(), denoiser, deepfloyd.batch(), CPU)[0]
    losses.mean().backward()
    gradient = denoiser.conv_out.weight.grad
    assert gradient[:3].abs().sum() > 0 and not gradient[3:].any()
    with torch.no_grad():
        denoiser.conv_out.bias[3:] += 100
        assert torch.equal(train.train_step(deepfloyd.family, deepfloyd.objective(), denoiser, deepfloyd.batch(), CPU)[0], losses)


def test_pixels_are_what_is_trained_and_the_cache_keeps_every_value_of_a_channel() -> None:
    from helpers.families.loading.pixels import Pixels

    values = torch.arange(256, dtype=torch.float32)
    pixels = (values / 127.5 - 1).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    codec = Pixels()
    [kept] = codec.encode(pixels).values()
    assert torch.equal(kept, pixels)
    back = codec.decode(stored(kept, "auto"))
    assert torch.equal(((back + 1) * 127.5).round()[0, 0].flatten(), values)
    assert (back - pixels).abs().max() * 127.5 < 1 / 30  # of the step between two values
    assert codec.decode(2 * pixels).abs().max() == 1


def test_sampling_takes_the_variance_that_is_not_learnt(deepfloyd: Tried) -> None:
    assert json.loads((deepfloyd.folder / "scheduler" / "scheduler_config.json").read_text())["variance_type"] == "learned_range"
    assert deepfloyd.objective().scheduler_config["variance_type"] == "fixed_small"
    assert deepfloyd.objective().scheduler_config["beta_schedule"] == "squaredcos_cap_v2"


@pytest.fixture
def attention_in_bf16() -> None:
    """Skips where PyTorch's own attention fails in bf16: with AVX-512 in the processor, and ATEN_CPU_CAPABILITY set to less."""
    ones = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(ones, ones, ones)
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        pytest.skip(f"scaled_dot_product_attention of PyTorch {torch.__version__}: {error}")


@pytest.mark.usefixtures("attention_in_bf16")
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_mixed_precision_takes_weights_of_either_precision(deepfloyd: Tried, weights: torch.dtype) -> None:
    losses = []
    for dtype, mixed in ((torch.float32, False), (weights, True)):
        denoiser = deepfloyd.family.load(dtype).denoiser
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(train.train_step(deepfloyd.family, deepfloyd.objective(), denoiser, deepfloyd.batch(), CPU)[0])
    assert torch.allclose(*losses, rtol=0.02) and not torch.equal(*losses)


# -- stage II ----------------------------------------------------------------------------------------------------------------


def test_stage_two_is_shown_no_detail_of_its_picture() -> None:
    """A pattern of single pixels is gone, as a quarter without antialiasing would not have it, and gentle shades are left."""
    checkers = torch.ones(1, 3, 32, 32)
    checkers[..., ::2, ::2] = checkers[..., 1::2, 1::2] = -1
    assert quarter(checkers).abs().max() < 0.02
    shades = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert (smaller_and_larger_again(shades) - shades).abs().max() < 0.15
    pillow = Image.fromarray(((shades[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).resize((8, 8), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(pillow)).float()
    assert (((quarter(shades)[0] + 1) * 127.5).permute(1, 2, 0) - expected).abs().max() < 1.5


def test_the_noise_of_the_smaller_picture_is_drawn_for_each_place_of_each_step(stage_two: Tried) -> None:
    def told(step: int, places: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[list[int], Tensor]:
        batch = stage_two.batch(step=step)
        draws = StepDraws(seed=11, step=step, places=places, step_samples=4)
        part = dataclasses.replace(
            batch,
            draws=draws,
            latents=batch.latents[list(places)],
            text={name: tensor[list(places)] for name, tensor in batch.text.items()},
        )
        conditioning = stage_two.family.conditioning(part, CPU)
        return conditioning["image_noise_level"].tolist(), conditioning["image"]

    levels, images = told(3)
    assert told(3)[0] == levels and torch.equal(told(3)[1], images)
    assert told(4)[0] != levels
    part_levels, part_images = told(3, (2, 1))  # another process has other places of the same step
    assert part_levels == [levels[2], levels[1]] and torch.equal(part_images, images[[2, 1]])
    seen = sorted(level for step in range(50) for level in told(step)[0])
    assert 0 <= seen[0] < 25 and 975 <= seen[-1] < 1000
    assert all(45 <= sum(low <= level < low + 250 for level in seen) <= 55 for low in (0, 250, 500, 750))


def test_the_noise_of_the_smaller_picture_is_none_of_what_the_larger_one_gets(stage_two: Tried) -> None:
    batch = stage_two.batch()
    assert not torch.equal(batch.draws.normal("noise", 3, 8, 8), batch.draws.normal("image_noise", 3, 8, 8))
    timesteps = stage_two.objective().corrupt(batch.latents, batch.draws).timesteps
    assert stage_two.family.conditioning(batch, CPU)["image_noise_level"].tolist() != timesteps.tolist()


# -- sampling and settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler"])
def test_validation_makes_the_pictures_that_the_pipeline_makes(deepfloyd: Tried, sampler: str) -> None:
    import diffusers

    schedule = {**deepfloyd.family.scheduler_config, "timestep_spacing": "trailing"}
    plain: Any = DiffusionPipeline.from_pretrained(deepfloyd.folder)
    plain.scheduler = getattr(diffusers, sampler).from_config(schedule)
    unet = plain.unet.eval()
    ours = deepfloyd.family.pipeline(unet, getattr(diffusers, sampler).from_config(schedule))
    for pipeline in (plain, ours):
        pipeline.set_progress_bar_config(disable=True)
    with deepfloyd.family.text_encoders(CPU) as encoders:
        text, negative = ({n: t[0] for n, t in encoders.encode([caption]).items()} for caption in ("a red circle", "blue"))
    picture = torch.linspace(-1, 1, 24).expand(1, 3, 16, 24).contiguous()
    family: Any = deepfloyd.family
    begins = family.img2img_arguments(picture, 3, 0.2) if family.refines else {"num_inference_steps": 3, "width": 24, "height": 16}
    usual = {"guidance_scale": 4.0}
    made = ours(
        **deepfloyd.family.prompt_arguments(text, negative), **begins, **usual, generator=torch.manual_seed(3), output_type="latent"
    ).images
    if deepfloyd.family.refines:
        assert begins.pop("noise_level") == 250  # which the pipeline takes by itself
        assert begins["image"].shape == (1, 3, 4, 6)
    expected = plain(
        "a red circle",
        negative_prompt="blue",
        **begins,
        **usual,
        generator=torch.manual_seed(3),
        output_type="pt",
        clean_caption=False,
    ).images
    assert made.shape == (1, 3, 16, 24)
    assert torch.allclose(made, expected, atol=1e-5)


def test_pictures_of_stage_one_that_begin_with_pictures_are_those_of_the_pipeline(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import IFImg2ImgPipeline

    family = _tried("deepfloyd_1", miniature, tmp_path).family
    schedule = DDPMScheduler.from_config({**family.scheduler_config, "timestep_spacing": "trailing"})
    plain: Any = IFImg2ImgPipeline.from_pretrained(miniature("deepfloyd_1"), scheduler=schedule)
    ours = family.img2img_pipeline(plain.unet.eval(), schedule)
    for pipeline in (plain, ours):
        pipeline.set_progress_bar_config(disable=True)
    with family.text_encoders(CPU) as encoders:
        text, negative = ({n: t[0] for n, t in encoders.encode([caption]).items()} for caption in ("a red circle", "blue"))
    picture = torch.linspace(-1, 1, 24).expand(1, 3, 16, 24).contiguous()
    begins = family.img2img_arguments(picture, 10, 0.4)
    usual = {"guidance_scale": 4.0, "generator": torch.Generator()}
    usual["generator"].manual_seed(3)
    made = ours(**family.prompt_arguments(text, negative), **begins, **usual, output_type="latent").images
    usual["generator"].manual_seed(3)
    asked = {"image": picture, "strength": 0.4, "num_inference_steps": 10, "output_type": "pt", "clean_caption": False}
    expected = plain("a red circle", negative_prompt="blue", **asked, **usual).images
    assert made.shape == picture.shape
    assert torch.allclose(made, expected, atol=1e-5) and not torch.allclose(made, picture, atol=1e-2)


def test_sizes_of_pictures_are_multiples_of_eight(deepfloyd: Tried) -> None:
    assert parse_sizes("67x101", parse_sizes("64", None, 8)[0], deepfloyd.family.latents.alignment)[0] == (64, 104)


def test_an_exported_pipeline_samples_with_the_variance_that_is_not_learnt(deepfloyd: Tried, tmp_path: Path) -> None:
    method = FullFineTune(AdapterOptions(), deepfloyd.family)
    schedule = {**deepfloyd.objective().scheduler_config, "_class_name": "DDPMScheduler"}
    method.export(method.attach(deepfloyd.family.load(torch.float32)), tmp_path, schedule, None)
    scheduler = json.loads((tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["variance_type"], scheduler["beta_schedule"]) == ("fixed_small", "squaredcos_cap_v2")
    assert (tmp_path / "pipeline" / "image_noising_scheduler").is_dir() == (deepfloyd.miniature == "deepfloyd_2")


@pytest.mark.parametrize("stage", ["deepfloyd-lora", "deepfloyd-stage2"])
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--latent_sampling=sample", "has no VAE: use mean"),
        ("--pretrained_vae_model_name_or_path=some/vae", "--pretrained_vae_model_name_or_path is for a VAE"),
        ("--vae_dtype=fp32", "--vae_dtype is for a VAE"),
        ("--tokenizer_max_length=120", "is for Stable Diffusion 3, .*PixArt Sigma"),
        ("--validation_guidance_rescale=0.7", "whose pipelines cannot rescale guidance"),
        ("--validation_noise_scheduler=euler", "Use ddpm, ddim or unipc"),
    ],
)
def test_what_pixels_or_the_pipelines_cannot_do_is_refused_before_anything_is_loaded(stage: str, flag: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config([f"--model_type={stage}", "--pretrained_model_name_or_path=someone/model", flag], {}, known_axes())


@pytest.mark.parametrize(("stage", "edge", "guidance"), [("deepfloyd-full", 64, 7), ("deepfloyd-stage2-lora", 256, 4)])
def test_each_stage_is_trained_at_its_size_unless_another_is_set(stage: str, edge: int, guidance: float, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "pictures", "instance_data_dir": str(tmp_path / "pictures")}]))
    (tmp_path / "pictures").mkdir()
    flags = [f"--model_type={stage}", "--pretrained_model_name_or_path=someone/model", f"--data_backend_config={data}"]
    usual, own = (read_config([*flags, *more], {}, known_axes()) for more in ([], ["--resolution=0.05", "--resolution_type=area"]))
    assert [(d.resolution, d.resolution_type, d.aspect_bucket_alignment) for d in usual.datasets] == [(edge, "pixel", 8)]
    assert (usual.validation.validation_guidance, usual.validation.validation_noise_scheduler) == (guidance, "ddpm")
    assert [(d.resolution, d.resolution_type) for d in own.datasets] == [(0.05, "area")]
    with pytest.raises(ConfigError, match="did you mean --resolution_type=area"):
        read_config([*flags, "--resolution=0.05"], {}, known_axes())
