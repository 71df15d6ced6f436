from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from demo import autoencoder, make_base, text_encoders
from demo.drawings import CONCEPT, VOCABULARY, Scene, draw, random_scene
from helpers.config.options import CacheOptions, ModelOptions
from helpers.families.miniatures.sdxl import SdxlSizes, build_sdxl
from helpers.families.sdxl import SDXL

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    """A base model made by demo/make_base.py, hardly trained."""
    folder = tmp_path_factory.mktemp("base")
    make_base.make_base(folder, vae_steps=2, text_steps=40)
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


def test_every_caption_word_is_one_token_and_so_is_the_concept(base: StableDiffusionXLPipeline) -> None:
    assert len(base.tokenizer.tokenize(Scene(CONCEPT, "orange", "black").caption)) == 7
    assert all(len(base.tokenizer.tokenize(word)) == 1 for word in make_base.vocabulary())


def test_the_base_is_written_as_half_precision(base: StableDiffusionXLPipeline) -> None:
    assert {module.dtype for module in (base.text_encoder, base.text_encoder_2)} == {torch.float16}


def test_the_base_predicts_velocity_and_starts_from_pure_noise(base: StableDiffusionXLPipeline) -> None:
    assert base.scheduler.config.prediction_type == "v_prediction"
    base.scheduler.set_timesteps(20)
    assert base.scheduler.timesteps[0] == 999
    assert base.scheduler.alphas_cumprod[-1] < 1e-6


def test_sampled_latents_have_the_noise_that_the_decoder_was_trained_with(base: StableDiffusionXLPipeline) -> None:
    spread = base.vae.encode(torch.rand(2, 3, 64, 64) * 2 - 1).latent_dist.std
    assert torch.allclose(spread, torch.tensor(autoencoder.LATENT_NOISE), rtol=1e-2)


def test_latents_of_the_embedded_model_have_about_unit_variance_and_decode_to_the_image(tmp_path: Path) -> None:
    """Encoded and decoded with the right scale: 31 dB over images of the demo, which a wrong scale would not reach."""
    options = ModelOptions(pretrained_model_name_or_path=str(MODEL))
    family = SDXL(options, dataclasses.replace(CacheOptions(), cache_dir=tmp_path))
    rng = random.Random(0)
    pixels = torch.stack([autoencoder.to_tensor(draw(random_scene(rng))) for _ in range(32)])
    with family.image_codec(torch.device("cpu")) as codec:
        latents = codec.encode(pixels)["mean"]
        decoded = codec.decode(latents)
    assert abs(latents.mean().item()) < 0.1 and latents.std().item() == pytest.approx(1, abs=0.1)
    assert -10 * ((pixels - decoded) / 2).square().mean().log10().item() > 29


def test_trained_text_encoders_distinguish_every_attribute_of_a_caption() -> None:
    pipeline = build_sdxl(vocabulary=VOCABULARY, sizes=SdxlSizes(pooled_width=64))
    assert text_encoders.train(pipeline, steps=2) < 0.6
    assert text_encoders.train(pipeline, steps=80) > 0.95


def test_the_encoders_scale_is_one_and_setting_it_changes_nothing_else() -> None:
    pipeline = build_sdxl(vocabulary=VOCABULARY)
    tokens = torch.tensor(pipeline.tokenizer_2(["a red circle on a blue background", "a black square on an orange background"]).input_ids)
    before = pipeline.text_encoder_2(tokens).text_embeds
    text_encoders._set_spread(pipeline.text_encoder_2, tokens)
    after = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    assert after.hidden_states[-2].std().item() == pytest.approx(1, abs=0.02)
    assert torch.nn.functional.cosine_similarity(before, after.text_embeds).min() > 0.99


def test_images_become_tensors_between_minus_one_and_one() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    tensor = autoencoder.to_tensor(image)
    assert tensor.shape == (3, 2, 4)
    assert tensor[0].unique().tolist() == [1.0] and tensor[1].unique().tolist() == [-1.0]
