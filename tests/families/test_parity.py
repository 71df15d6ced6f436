"""The training step of each family against diffusers. The expected side knows torch, diffusers and the numbers written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import Tensor

import train
from helpers.families.text import clip
from helpers.families.tiny import MINIATURES
from tests.families.conftest import CAPTIONS, CLIP_ALONE, CPU, PIXELS, Tried, open_family
from tests.families.other_losses import other_losses

# What the geometry of the batches means to each family: (height, width) of the file, (top, left), and the target size or the score.
NUMBERS = {"sdxl": [1157.0, 1920, 36, 25, 768, 1344], "sdxl_refiner": [1157.0, 1920, 36, 25, 7]}
LONG = "a photo of a cat " * 30


def embeddings(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    """What a pipeline of diffusers makes of captions, by our names."""
    with torch.no_grad():
        given = pipeline.encode_prompt(captions, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"prompt_embeds": given[0], "pooled": given[2]} if len(given) == 4 else {"prompt_embeds": given[0]}


def answer(pipeline: Any, miniature: str, noisy: Tensor, timesteps: Tensor, captions: list[str]) -> Tensor:
    text = embeddings(pipeline, captions)
    more = {}
    if miniature in NUMBERS:
        numbers = torch.tensor([NUMBERS[miniature]] * len(captions))
        more = {"added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": numbers}}
    with torch.no_grad():
        return pipeline.unet(noisy, timesteps, text["prompt_embeds"], **more).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("tried", CLIP_ALONE, indirect=True)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", None])
def test_prediction_target_and_loss_are_those_of_diffusers(tried: Tried, prediction: str | None) -> None:
    objective = tried.objective(prediction_type=prediction)
    batch = tried.batch()
    denoiser = tried.family.load(torch.float32).denoiser
    with torch.no_grad():
        losses, corrupted = train.train_step(tried.family, objective, denoiser, batch, CPU)

    scheduler: Any = DDPMScheduler.from_pretrained(tried.folder, subfolder="scheduler")
    noise, timesteps = batch.draws.normal("noise", *batch.latents.shape[1:]), corrupted.timesteps
    noisy = scheduler.add_noise(batch.latents, noise, timesteps)
    predicts = prediction or {"sd2": "v_prediction"}.get(tried.miniature, "epsilon")
    velocity = scheduler.get_velocity(batch.latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": batch.latents}[predicts]
    pipeline: Any = DiffusionPipeline.from_pretrained(tried.folder)
    predicted = answer(pipeline, tried.miniature, noisy, timesteps, list(CAPTIONS))
    assert torch.allclose(corrupted.noisy, noisy, atol=1e-5)
    assert torch.allclose(corrupted.target, target, atol=1e-5)
    assert torch.allclose(losses, ((predicted - target) ** 2).mean(dim=(1, 2, 3)), rtol=1e-5)
    for ours, expected in other_losses(tried, batch, predicts, predicted, target, scheduler.alphas_cumprod[timesteps]):
        assert torch.allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize("tried", CLIP_ALONE, indirect=True)
def test_captions_are_encoded_as_the_pipeline_encodes_them(tried: Tried) -> None:
    captions = [*CAPTIONS, LONG]
    with tried.family.text_encoders(CPU) as encoders:
        ours = encoders.encode(captions)
        assert encoders.truncated == 1
    theirs = embeddings(DiffusionPipeline.from_pretrained(tried.folder), captions)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("tried", CLIP_ALONE, indirect=True)
def test_token_ids_are_those_of_the_pipeline(tried: Tried) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(tried.folder)
    pads = {"tokenizer": {"sd1": "<|endoftext|>", "sd2": "!", "sdxl": "<|endoftext|>"}.get(tried.miniature), "tokenizer_2": "!"}
    for name, pad in pads.items():
        if (tokenizer := getattr(pipeline, name, None)) is not None:
            theirs = tokenizer([*CAPTIONS, LONG], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            ours, too_long = clip.tokenize(tokenizer, [*CAPTIONS, LONG])
            assert torch.equal(ours, theirs) and too_long == 1
            assert tokenizer.convert_ids_to_tokens(ours[0, -1].item()) == pad


@pytest.mark.parametrize("tried", CLIP_ALONE, indirect=True)
def test_a_dropped_caption_is_what_the_pipeline_takes_for_no_negative_prompt(tried: Tried) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(tried.folder)
    with torch.no_grad():
        given = pipeline.encode_prompt(["a cat"], device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True)
    expected = {"prompt_embeds": given[1], **({"pooled": given[3]} if len(given) == 4 else {})}
    with tried.family.text_encoders(CPU) as encoders:
        dropped = tried.family.unconditional(encoders)
    assert all(torch.allclose(dropped[name], expected[name][0], atol=1e-5) for name in expected)


@pytest.mark.parametrize("tried", [name for name in MINIATURES if name not in PIXELS], indirect=True)
def test_latents_are_scaled_means_and_decode_to_what_was_encoded(tried: Tried) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae: Any = AutoencoderKL.from_pretrained(tried.folder, subfolder="vae")
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0
    with tried.family.image_codec(CPU) as codec:
        latents = codec.encode(pixels)["mean"]
        decoded = codec.decode(latents)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        expected = vae.decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(latents, (mean - shift) * scale, atol=1e-5)
    assert torch.allclose(decoded, expected, atol=1e-5)


def test_the_refiner_is_told_the_score_that_was_set(miniature: Any, tmp_path: Any) -> None:
    family = open_family("sdxl_refiner", miniature("sdxl_refiner"), tmp_path, data_aesthetic_score=5.5, sdxl_original_size="intermediary")
    batch = Tried("sdxl_refiner", tmp_path, family).batch(["a cat"])
    assert family.conditioning(batch, CPU)["time_ids"].tolist() == [[840, 1394, 36, 25, 5.5]]
