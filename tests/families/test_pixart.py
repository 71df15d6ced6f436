"""PixArt: what the network sees of captions, which channels are trained, and what it is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers.choices import known_axes
from helpers.config.options import AdapterOptions, ObjectiveOptions
from helpers.config.read import read_config
from helpers.data.base.padding import stacked, without_padding
from helpers.errors import ConfigError
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.objectives.diffusion import Diffusion
from helpers.protocols import ModelFamily
from helpers.training.validation import parse_sizes
from tests.families.conftest import CAPTIONS, CPU, Tried, open_family

TIMESTEPS = torch.tensor([0, 300, 700, 999])


@pytest.fixture(params=["pixart_sigma", "pixart_alpha"])
def pixart(request: pytest.FixtureRequest, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    folder = miniature(request.param)
    return Tried(request.param, folder, open_family(request.param, folder, tmp_path / "cache"))


def answer(family: ModelFamily, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return family.predict(family.load(torch.float32).denoiser, batch.latents, TIMESTEPS, family.conditioning(batch, CPU))


def test_what_stands_behind_the_mask_does_not_change_the_answer(pixart: Tried) -> None:
    batch = pixart.batch()
    before = answer(pixart.family, batch)
    hidden = ~batch.text["prompt_embeds_mask"]
    batch.text["prompt_embeds"][hidden] = 100.0
    assert torch.equal(answer(pixart.family, batch), before)
    batch.text["prompt_embeds"][~hidden] = 1.0
    assert (answer(pixart.family, batch) - before).abs().max() > 1e-3


def test_captions_without_their_padding_give_the_same_answer(pixart: Tried) -> None:
    batch = pixart.batch()
    rows = [{name: tensor[index] for name, tensor in batch.text.items()} for index in range(len(CAPTIONS))]
    short = [without_padding(row) for row in rows]
    assert [len(row["prompt_embeds"]) for row in short] == pixart.family.caption_lengths().token_counts(CAPTIONS)
    trimmed = dataclasses.replace(batch, text=stacked(short))
    assert trimmed.text["prompt_embeds"].shape[1] == 9
    assert torch.allclose(answer(pixart.family, trimmed), answer(pixart.family, batch), atol=1e-5)


def test_the_channels_of_the_variance_are_not_trained(pixart: Tried) -> None:
    denoiser = pixart.family.load(torch.float32).denoiser
    objective = Diffusion(ObjectiveOptions(), pixart.family.scheduler_config)
    train.train_step(pixart.family, objective, denoiser, pixart.batch(), CPU)[0].mean().backward()
    gradient = denoiser.proj_out.weight.grad.reshape(4, 8, -1)  # of each pixel of a patch, by channel
    assert gradient[:, :4].abs().sum() > 0 and not gradient[:, 4:].any()


def test_alpha_is_told_the_size_that_is_trained_and_sigma_none(pixart: Tried) -> None:
    told = pixart.family.conditioning(pixart.batch(["a cat"]), CPU)
    if pixart.miniature == "pixart_sigma":
        assert not {"resolution", "aspect_ratio"} & told.keys()
    else:
        assert told["resolution"].tolist() == [[768, 1344]]
        assert told["aspect_ratio"].tolist() == [[pytest.approx(768 / 1344)]]


def test_capitals_and_surrounding_blanks_are_not_seen(pixart: Tried) -> None:
    with pixart.family.text_encoders(CPU) as encoders:
        plain, loud = encoders.encode(["a red circle"]), encoders.encode(["  A Red CIRCLE "])
    assert all(torch.equal(plain[name], loud[name]) for name in plain)
    assert pixart.family.caption_lengths().token_counts(["A Red CIRCLE "]) == pixart.family.caption_lengths().token_counts(["a red circle"])


def test_the_length_of_captions_can_be_set_and_is_part_of_the_fingerprint(pixart: Tried, tmp_path: Path) -> None:
    usual = {"pixart_sigma": 300, "pixart_alpha": 120}[pixart.miniature]
    short = open_family(pixart.miniature, pixart.folder, tmp_path / "cache", tokenizer_max_length=6)
    assert (pixart.family.caption_lengths().limit, short.caption_lengths().limit) == (usual, 6)
    with pixart.family.text_encoders(CPU) as encoders, short.text_encoders(CPU) as shorter:
        assert encoders.encode(CAPTIONS)["prompt_embeds"].shape[1] == usual
        assert shorter.encode(CAPTIONS)["prompt_embeds"].shape[1] == 6
        assert (encoders.truncated, shorter.truncated) == (0, 1)
        assert encoders.fingerprint != shorter.fingerprint


def test_gradient_checkpointing_changes_no_gradient(pixart: Tried) -> None:
    objective = Diffusion(ObjectiveOptions(), pixart.family.scheduler_config)
    gradients = []
    for saves_memory in (False, True):
        denoiser = pixart.family.load(torch.float32).denoiser.train()
        if saves_memory:
            denoiser.enable_gradient_checkpointing()
        train.train_step(pixart.family, objective, denoiser, pixart.batch(), CPU)[0].mean().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    assert denoiser.gradient_checkpointing
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_pictures_are_made_of_captions_of_different_lengths_at_any_size_of_whole_patches(pixart: Tried, guidance: float) -> None:
    from diffusers import DDIMScheduler

    [size] = parse_sizes("72x100", parse_sizes("64", None, 8)[0], pixart.family.latents.alignment)
    assert (size.width, size.height) == (64, 96)
    with pixart.family.text_encoders(CPU) as encoders:
        text, negative = (without_padding({n: t[0] for n, t in encoders.encode([c]).items()}) for c in ("a photo of a cat", ""))
    assert len(text["prompt_embeds"]) != len(negative["prompt_embeds"])
    schedule = DDIMScheduler.from_config(dict(pixart.family.scheduler_config))
    pipeline = pixart.family.pipeline(pixart.family.load(torch.float32).denoiser.eval(), schedule)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        **pixart.family.prompt_arguments(text, negative),
        width=size.width,
        height=size.height,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert images.shape == (1, 4, 12, 8) and images.isfinite().all()


def test_an_early_copy_of_alpha_is_trained_and_handed_over_under_its_name_of_today(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """They name the class that the network was once a part of, and leave unsaid whether sizes are told."""
    from diffusers import DiffusionPipeline

    early = shutil.copytree(miniature("pixart_alpha"), tmp_path / "early")
    for path, changes in {
        early / "model_index.json": {"transformer": ["diffusers", "Transformer2DModel"]},
        early / "transformer" / "config.json": {"_class_name": "Transformer2DModel", "use_additional_conditions": None},
    }.items():
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    family = open_family("pixart_alpha", early, tmp_path / "cache")
    assert "resolution" in family.conditioning(Tried("pixart_alpha", early, family).batch(["a cat"]), CPU)
    method = FullFineTune(AdapterOptions(), family)
    method.export(method.attach(family.load(torch.float32)), tmp_path / "out", dict(family.scheduler_config), None)
    opened: Any = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert type(opened.transformer).__name__ == "PixArtTransformer2DModel" and opened.transformer.use_additional_conditions


def test_a_lora_is_also_a_folder_in_the_layout_of_peft(pixart: Tried, tmp_path: Path) -> None:
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=4, lora_alpha=8.0), pixart.family)
    trainable = method.attach(pixart.family.load(torch.float32))
    live = dict(trainable.parameters)
    written = method.export(trainable, tmp_path, {}, live)
    names = [f"pytorch_lora_weights.{ending}" for ending in ("safetensors", "kohya.safetensors", "peft")]
    assert [path.name for path in written] == [*names, *(name.replace("weights", "weights_live", 1) for name in names)]
    config = json.loads((written[2] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 4, 8.0, 0.0)
    stored = load_file(written[2] / "adapter_model.safetensors")
    layer = "transformer_blocks.0.attn1.to_q.lora_A"
    assert torch.equal(stored[f"base_model.model.{layer}.weight"], live[f"{layer}.default.weight"])


def test_a_file_of_the_family_describes_itself(pixart: Tried) -> None:
    told = pixart.family.modelspec("lora")
    expected = {"pixart_sigma": ("pixart-sigma/lora", "64x64"), "pixart_alpha": ("pixart-alpha/lora", "1024x1024")}[pixart.miniature]
    assert (told["modelspec.architecture"], told["modelspec.resolution"]) == expected


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--aspect_bucket_alignment=8", "16-pixel patches"),
        ("--validation_guidance_rescale=0.7", "is not for PixArt"),
    ],
)
def test_what_the_network_or_its_pipeline_cannot_do_is_refused_before_anything_is_loaded(flag: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(["--pixart_sigma", "--pretrained_model_name_or_path=someone/model", flag], {}, known_axes())


def test_the_gradient_is_clipped_as_the_authors_do_unless_another_norm_is_set(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "pictures", "instance_data_dir": str(tmp_path / "pictures")}]))
    (tmp_path / "pictures").mkdir()
    flags = ["--pixart_sigma", "--pretrained_model_name_or_path=someone/model", f"--data_backend_config={data}"]
    usual, own = (read_config([*flags, *more], {}, known_axes()) for more in ([], ["--max_grad_norm=1"]))
    assert (usual.optimizer.max_grad_norm, own.optimizer.max_grad_norm) == (0.01, 1)
    assert usual.data.aspect_bucket_alignment == 64
