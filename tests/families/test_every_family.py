"""What holds for each family, on its miniature. A new family is tried here by its line in the table of miniatures."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import train
from helpers.config.options import AdapterOptions
from helpers.families import FAMILIES
from helpers.families.loading.locate import SETTINGS
from helpers.families.tiny import MINIATURES
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.protocols import Trainable
from tests.families.conftest import CPU, EXPECTED, Tried, family_name, open_family

LONG = bool(os.environ.get("SIMPLETUNER_TEST_LONG"))


def test_every_family_has_a_miniature() -> None:
    assert {family_name(miniature) for miniature in MINIATURES} == set(FAMILIES)


def test_settings_and_tokenizers_suffice_for_a_look_at_the_data(tried: Tried, tmp_path: Path) -> None:
    """As much of a model as --dataset_report fetches."""
    everything = {path.name for path in tried.folder.rglob("*") if path.is_file()}
    weights = {name for name in everything if not any(fnmatch(name, pattern) for pattern in SETTINGS)}
    bare = Path(shutil.copytree(tried.folder, tmp_path / "bare", ignore=lambda _, names: weights & set(names)))
    family = open_family(family_name(tried.miniature), bare, tmp_path / "bare-cache", needs_weights=False)
    assert weights and family.latents == tried.family.latents
    assert family.caption_lengths().token_counts(["a red circle"]) == tried.family.caption_lengths().token_counts(["a red circle"])
    assert family.caption_lengths().fingerprint == tried.family.caption_lengths().fingerprint


def full(tried: Tried) -> Trainable:
    return FullFineTune(AdapterOptions(), tried.family).attach(tried.family.load(torch.float32))


def lora(tried: Tried, *targets: str) -> Trainable:
    options = dataclasses.replace(AdapterOptions(), lora_dropout=0.0, lora_targets=targets)
    return Lora(options, tried.family).attach(tried.family.load(torch.float32))


def lora_everywhere(tried: Tried) -> Trainable:
    """On convolutions and linear layers of every kind: attention alone learns little of a network of random weights."""
    layers = tried.family.load(torch.float32).denoiser.named_modules()
    return lora(tried, *{name for name, layer in layers if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)})


def losses(tried: Tried, trainable: Trainable, *, steps: int, rate: float, until: float = 0.0) -> list[float]:
    """Of at most `steps` steps that always see the same four samples with the same noise, up to the first loss below `until`."""
    objective, batch = tried.objective(), tried.batch()
    optimizer = torch.optim.AdamW(trainable.parameters.values(), lr=rate)
    seen = []
    for _ in range(steps):
        loss = train.train_step(tried.family, objective, trainable.denoiser, batch, CPU)[0].mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(loss.item())
        if seen[-1] < until:
            break
    return seen


def test_latents_have_the_shape_that_the_family_says_and_so_has_the_answer(tried: Tried) -> None:
    spec = tried.family.latents
    with tried.family.image_codec(CPU) as codec:
        encoded = codec.encode(torch.zeros(1, 3, 64, 96))["mean"]
        assert codec.decode(encoded).shape == (1, 3, 64, 96)
    assert encoded.shape == (1, spec.channels, 64 // spec.downsampling, 96 // spec.downsampling)
    batch = tried.batch()
    noisy, timesteps = batch.latents, torch.tensor([0, 300, 700, 999])
    with torch.no_grad():
        answer = tried.family.predict(tried.family.load(torch.float32).denoiser, noisy, timesteps, tried.family.conditioning(batch, CPU))
    assert answer.shape == noisy.shape


@pytest.mark.parametrize("tried", ["sd2", "sdxl"], indirect=True)
def test_guidance_rescaled_in_full_leaves_each_sample_the_contrast_of_its_conditional_answer(tried: Tried) -> None:
    """Lin et al., 2023 (arXiv 2305.08891): by the standard deviation of each sample, not of the batch; half way is half of both."""
    pipeline = tried.family.pipeline(tried.family.load(torch.float32).denoiser, DDPMScheduler())
    modules = (sys.modules[kind.__module__] for kind in type(pipeline).__mro__)
    rescale = next(module.rescale_noise_cfg for module in modules if hasattr(module, "rescale_noise_cfg"))
    told, untold = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1, 1)
    guided = untold + 7.5 * (told - untold)
    whole = rescale(guided, told, guidance_rescale=1.0)
    assert torch.allclose(whole.flatten(1).std(1), told.flatten(1).std(1), rtol=1e-5)
    assert torch.allclose(rescale(guided, told, guidance_rescale=0.5), (whole + guided) / 2, rtol=1e-5)


def test_saturated_pixels_have_finite_latents_and_come_back_finite(tried: Tried, tmp_path: Path) -> None:
    """In the precision of a GPU too, where SDXL's VAE in fp16 would give black pictures."""
    flat = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    family = open_family(family_name(tried.miniature), tried.folder, tmp_path / "bf16", vae_dtype="bf16", latent_sampling="sample")
    for codec_of in (tried.family, family):
        with codec_of.image_codec(CPU) as codec:
            encoded = codec.encode(torch.cat([flat, stripes]))
            assert all(tensor.isfinite().all() for tensor in encoded.values())
            assert codec.decode(encoded["mean"]).isfinite().all()


def test_a_mask_leaves_out_its_black_part_of_each_answer(tried: Tried) -> None:
    """Also of networks that read patches of latents, answer with more channels, or work on pixels."""
    batch, objective = tried.batch(), tried.objective()
    batch = dataclasses.replace(batch, mask=torch.ones(4, 1, 8, 8))
    batch.mask[:, :, 3:] = 0  # type: ignore[index]
    denoiser = tried.family.load(torch.float32).denoiser.eval()
    losses, corrupted = train.train_step(tried.family, objective, denoiser, batch, CPU)
    answer = tried.family.predict(denoiser, corrupted.noisy, corrupted.timesteps, tried.family.conditioning(batch, CPU))
    squares = ((answer - corrupted.target)[:, :, :3] ** 2).mean(dim=(1, 2, 3)) * corrupted.weight
    assert torch.allclose(losses, squares, rtol=1e-4)
    (gradient,) = torch.autograd.grad(objective.loss(answer, corrupted, batch.mask).sum(), answer)
    assert not gradient[:, :, 3:].any() and gradient[:, :, :3].flatten(1).any(dim=1).all()


def test_conditioning_is_finite_and_has_a_row_for_each_sample(tried: Tried) -> None:
    conditioning = tried.family.conditioning(tried.batch(), CPU)
    assert all(tensor.isfinite().all() and len(tensor) == 4 for tensor in conditioning.values())


def test_a_dropped_caption_has_the_tensors_of_a_caption(tried: Tried) -> None:
    with tried.family.text_encoders(CPU) as encoders:
        dropped, caption = tried.family.unconditional(encoders), encoders.encode(["a cat"])
    assert {name: tensor.shape for name, tensor in dropped.items()} == {name: tensor.shape[1:] for name, tensor in caption.items()}


def test_a_caption_is_encoded_to_the_same_bits_each_time(tried: Tried) -> None:
    """In training an encoder of T5 would drop a tenth of what it knows, another tenth each time."""
    with tried.family.text_encoders(CPU) as encoders:
        first, second = encoders.encode(["a red circle"]), encoders.encode(["a red circle"])
    with tried.family.text_encoders(CPU) as encoders:
        again = encoders.encode(["a red circle"])
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], again[name]) for name in first)


def test_a_dropped_caption_is_what_the_base_model_was_trained_with(tried: Tried) -> None:
    """To the last bit: the empty caption, or zeros."""
    with tried.family.text_encoders(CPU) as encoders:
        dropped, empty = tried.family.unconditional(encoders), encoders.encode([""])
    largest = max(tensor.abs().max() for tensor in dropped.values() if tensor.is_floating_point())
    assert (largest == 0) == EXPECTED[tried.miniature].drops_to_zeros
    assert largest == 0 or all(torch.equal(dropped[name], empty[name][0]) for name in empty)


@pytest.mark.parametrize("network", [full, lora])
def test_one_step_lowers_the_loss_of_what_it_saw(tried: Tried, network: Callable[[Tried], Trainable]) -> None:
    before, *_, after = losses(tried, network(tried), steps=3, rate=1e-3)
    assert after < before


@pytest.mark.parametrize(("network", "rate"), [(full, 4e-3), (lora_everywhere, 1e-2)])
def test_four_samples_can_be_learnt_by_heart(tried: Tried, network: Callable[[Tried], Trainable], rate: float) -> None:
    """From a loss of 1 or more to 0.03 in at most 60 steps; latents of 16 channels hold four times as much, and take longer."""
    expected = EXPECTED[tried.miniature]
    if network is lora_everywhere and tried.miniature != tried.family.facts.miniatures[0].name and not LONG:
        pytest.skip("SIMPLETUNER_TEST_LONG=1 runs it; the family's first miniature has the same kind of network")
    first, *_, last = losses(tried, network(tried), steps=expected.learns_in, rate=rate * expected.rate, until=expected.learns_to)
    assert first > 0.9
    assert last < expected.learns_to


def test_an_adapter_goes_to_every_kind_of_layer_that_the_family_names(tried: Tried) -> None:
    modules = {name.rsplit(".lora_", 1)[0] for name in lora(tried).parameters}
    assert all(any(module.endswith(f".{target}") for module in modules) for target in tried.family.lora_targets)
    others = {name for name, _ in tried.family.load(torch.float32).denoiser.named_modules() if name.endswith(tried.family.lora_targets)}
    assert modules == others


def test_an_exported_index_names_what_is_there_and_the_sampler_that_was_asked_for(tried: Tried, tmp_path: Path) -> None:
    """The exported index names only folders that are there, and the class of the sampler that was asked for."""
    method = FullFineTune(AdapterOptions(), tried.family)
    sampler = list(tried.objective().samplers.values())[-1]
    method.export(full(tried), tmp_path, {**tried.family.scheduler_config, "_class_name": sampler}, None)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    named = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert named == {path.name for path in (tmp_path / "pipeline").iterdir() if path.is_dir()}
    assert index["scheduler"] == ["diffusers", sampler]
    assert index["_class_name"] == json.loads((tried.folder / "model_index.json").read_text())["_class_name"]
