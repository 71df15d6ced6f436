"""SDXL as we feed it against SDXL as diffusers feeds it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image

from helpers.config.options import CacheOptions, ModelOptions
from helpers.data.base.draws import StepDraws
from helpers.data.base.images import crop
from helpers.data.base.sample import Geometry, Size
from helpers.data.batches import Batch
from helpers.data.plan.buckets import geometry
from helpers.data.plan.targets import ResolutionRule
from helpers.errors import ModelError
from helpers.families.miniatures.sdxl import write_sdxl
from helpers.families.networks.sdxl_inputs import SDXLOptions
from helpers.families.sdxl import SDXL

CPU = torch.device("cpu")
CUT = Geometry(Size(1920, 1157), Size(1394, 840), top=36, left=25, target=Size(1344, 768))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


def make(model: Path, cache: Path, **options: Any) -> SDXL:
    own = (SDXLOptions(options.pop("original", "file")),)
    caching = dataclasses.replace(CacheOptions(), cache_dir=cache, **options)
    return SDXL(dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model), family_sections=own), caching)


def test_captions_are_encoded_as_the_pipeline_encodes_them(model: Path, tmp_path: Path) -> None:
    captions = ["a red circle", "", "a photo of a cat " * 30]
    with make(model, tmp_path).text_encoders(CPU) as encoders:
        ours = encoders.encode(captions)
        assert encoders.truncated == 1  # type: ignore[attr-defined]
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(captions, device=CPU, do_classifier_free_guidance=False)
    assert torch.allclose(ours["prompt_embeds"], states, atol=1e-5)
    assert torch.allclose(ours["pooled"], pooled, atol=1e-5)


def test_a_dropped_caption_is_zeros_and_not_the_empty_caption(model: Path, tmp_path: Path) -> None:
    family = make(model, tmp_path)
    with family.text_encoders(CPU) as encoders:
        dropped, empty = family.unconditional(encoders), encoders.encode([""])
    assert {name: tensor.abs().max().item() for name, tensor in dropped.items()} == {"prompt_embeds": 0.0, "pooled": 0.0}
    assert dropped["prompt_embeds"].shape == empty["prompt_embeds"].shape[1:]
    assert dropped["pooled"].shape == empty["pooled"].shape[1:]
    assert empty["prompt_embeds"].abs().max() > 0


def test_latents_are_scaled_means_and_decode_to_what_was_encoded(model: Path, tmp_path: Path) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    with make(model, tmp_path, latent_sampling="sample").image_codec(CPU) as codec:
        latents = codec.encode(pixels)
        decoded = codec.decode(latents["mean"])
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        expected = vae.decode(posterior.mean).sample.clamp(-1, 1)
    assert torch.allclose(latents["mean"], posterior.mean * vae.config.scaling_factor, atol=1e-5)
    assert torch.allclose(latents["std"], posterior.std * vae.config.scaling_factor, atol=1e-5)
    assert latents["mean"].shape == (2, 4, 8, 12)
    assert torch.allclose(decoded, expected, atol=1e-5)


def batch_of(cut: Geometry, dtype: torch.dtype = torch.float32) -> Batch:
    """One picture with that cut, whose caption says nothing."""
    draws = StepDraws(seed=1, step=0, places=(0,), step_samples=1)
    text = {"prompt_embeds": torch.zeros(1, 77, 64, dtype=dtype), "pooled": torch.zeros(1, 32, dtype=dtype)}
    return Batch(torch.zeros(1, 4, 8, 8), text, ("",), (), (cut,), torch.ones(1), draws, epoch=0)


def test_size_numbers_are_exact_and_in_the_order_of_the_paper(model: Path, tmp_path: Path) -> None:
    """(original height, width, top, left, target height, width); 1157 would be 1160 in bfloat16."""
    batch = batch_of(CUT)
    assert make(model, tmp_path).conditioning(batch, CPU)["time_ids"].tolist() == [[1157, 1920, 36, 25, 768, 1344]]
    intermediary = make(model, tmp_path, original="intermediary")
    assert intermediary.conditioning(batch, CPU)["time_ids"].tolist() == [[840, 1394, 36, 25, 768, 1344]]


@pytest.mark.parametrize(("style", "left"), [("center", 10), ("corner", 21)])
def test_a_wide_picture_is_told_in_whole_numbers_of_the_resized_picture(style: str, left: int, model: Path, tmp_path: Path) -> None:
    """1920 x 1080 is shrunk to 1365 x 768, of which 1344 are kept: 21 columns too many, of which the central cut has 10 at its left."""
    rule = ResolutionRule(1.0, crop=True, crop_style=style, crop_aspect="preserve")
    found = geometry(Size(1920, 1080), rule)
    assert found.resized == Size(1365, 768) and found.target == Size(1344, 768)
    batch = batch_of(found)
    assert make(model, tmp_path).conditioning(batch, CPU)["time_ids"].tolist() == [[1080, 1920, 0, left, 768, 1344]]
    assert crop(Image.new("RGB", (1920, 1080)), found).shape == (3, 768, 1344)


def test_size_numbers_reach_the_sinusoid_in_float32_whatever_the_precision_of_the_weights(model: Path, tmp_path: Path) -> None:
    """1157 is 1160 in bfloat16, and its embedding then another one: their cosine is 0.823."""
    family = make(model, tmp_path)
    denoiser = family.load(torch.bfloat16).denoiser
    seen: list[torch.Tensor] = []
    denoiser.add_time_proj.register_forward_hook(lambda module, given, embedded: seen.extend((given[0], embedded)))
    batch = batch_of(CUT, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        family.predict(denoiser, torch.zeros(1, 4, 8, 8), torch.tensor([500]), family.conditioning(batch, CPU))
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [1157, 1920, 36, 25, 768, 1344]
    exact, rounded = sinusoid(1157.0), sinusoid(torch.tensor(1157.0).bfloat16().item())
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0).item() == pytest.approx(0.823, abs=5e-4)
    width = seen[1].shape[1]
    assert torch.allclose(seen[1][0], sinusoid(1157.0, width), atol=1e-3)


def sinusoid(number: float, width: int = 256) -> torch.Tensor:
    """cos and sin of the number at frequencies from 1 down towards 1 / 10,000."""
    half = width // 2
    angles = number * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()]).float()


def test_fingerprints_follow_the_weights_and_are_known_without_loading_them(model: Path, tmp_path: Path) -> None:
    with make(model, tmp_path).image_codec(CPU) as codec, make(model, tmp_path).text_encoders(CPU) as encoders:
        before = codec.fingerprint, encoders.fingerprint
        assert codec._vae is None  # type: ignore[attr-defined]
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    with make(copy, tmp_path).image_codec(CPU) as codec:
        assert codec.fingerprint == before[0]  # another place is not another VAE
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with make(copy, tmp_path).image_codec(CPU) as codec, make(copy, tmp_path).text_encoders(CPU) as encoders:
        assert codec.fingerprint != before[0]
        assert encoders.fingerprint == before[1]


def test_a_vae_that_overflows_in_fp16_is_refused_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="black images"), make(model, tmp_path, vae_dtype="fp16").image_codec(CPU):
        pass


def test_a_vae_is_loaded_in_float32_unless_asked_otherwise_on_every_device(model: Path, tmp_path: Path) -> None:
    """Opening the codec loads nothing, so a device that is not here will do."""
    keys = {}
    for dtype in ("default", "fp32", "bf16"):
        with make(model, tmp_path, vae_dtype=dtype).image_codec(torch.device("meta")) as codec:
            keys[dtype] = codec.fingerprint
    assert keys["default"] == keys["fp32"] != keys["bf16"]


def test_other_models_and_broken_ones_are_named(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(ModelError, match="has no tokenizer_2 folder"):
        make(copy, tmp_path)
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(ModelError, match="is of Stable Diffusion 3 .*, not of SDXL: train it with ./train_sd3.sh"):
        make(copy, tmp_path)
    (copy / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        make(copy, tmp_path)
    with pytest.raises(ModelError, match="is no folder here, and of a model of this name"):
        make(Path("no-such-owner/no-such-model"), tmp_path)
