"""Hunyuan-DiT: what differs between its versions, what it is told, and what of a caption is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import train
from helpers.choices import known_axes
from helpers.config.options import AdapterOptions, ObjectiveOptions
from helpers.config.read import read_config
from helpers.data.base.padding import stacked, without_padding
from helpers.errors import ConfigError
from helpers.methods.full import FullFineTune
from helpers.objectives.diffusion import Diffusion
from helpers.protocols import ModelFamily
from tests.families.conftest import CAPTIONS, CPU, Tried, open_family

TIMESTEPS = torch.tensor([0, 300, 700, 999])


@pytest.fixture(params=["hunyuan_dit", "hunyuan_dit_11"])
def hunyuan(request: pytest.FixtureRequest, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    folder = miniature(request.param)
    return Tried(request.param, folder, open_family("hunyuan_dit", folder, tmp_path / "cache"))


def answer(family: ModelFamily, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return family.predict(family.load(torch.float32).denoiser, batch.latents, TIMESTEPS, family.conditioning(batch, CPU))


def test_the_schedule_is_that_of_the_version(hunyuan: Tried) -> None:
    """Of scaled-linear betas the last is beta_end; sqrt(abar) at the end follows from it."""
    objective = Diffusion(ObjectiveOptions(), hunyuan.family.scheduler_config)
    beta_end = {"hunyuan_dit": 0.018, "hunyuan_dit_11": 0.03}[hunyuan.miniature]
    abar = objective.alphas_cumprod.double()
    assert objective.prediction_type == "v_prediction"
    assert 1 - (abar[-1] / abar[-2]).item() == pytest.approx(beta_end, rel=1e-4)


def test_versions_up_to_1_1_are_told_width_before_height_and_the_style_0(hunyuan: Tried) -> None:
    told = hunyuan.family.conditioning(hunyuan.batch(["a cat"]), CPU)
    if hunyuan.miniature == "hunyuan_dit":
        assert not {"image_meta_size", "style"} & told.keys()
    else:
        assert told["image_meta_size"].tolist() == [[1920, 1157, 1344, 768, 25, 36]]
        assert told["style"].tolist() == [0] and told["style"].dtype == torch.long


def test_what_stands_behind_a_mask_of_bert_does_not_change_the_answer_and_what_mt5_pads_does(hunyuan: Tried) -> None:
    batch = hunyuan.batch()
    before = answer(hunyuan.family, batch)
    batch.text["prompt_embeds"][~batch.text["prompt_embeds_mask"]] = 100.0
    assert torch.equal(answer(hunyuan.family, batch), before)
    batch.text["prompt_embeds_2"][~batch.text["prompt_attention_mask_2"]] = 1.0
    assert (answer(hunyuan.family, batch) - before).abs().max() > 1e-4


def test_captions_as_the_cache_holds_them_give_the_same_answer(hunyuan: Tried) -> None:
    batch = hunyuan.batch()
    short = [without_padding({name: tensor[index] for name, tensor in batch.text.items()}) for index in range(len(CAPTIONS))]
    assert [row["prompt_embeds"].shape[0] for row in short] == [5, 10, 2, 4]  # with the marks of beginning and end
    assert {row["prompt_embeds_2"].shape[0] for row in short} == {256}
    kept = dataclasses.replace(batch, text=stacked(short))
    assert torch.equal(answer(hunyuan.family, kept), answer(hunyuan.family, batch))


def test_the_channels_of_the_variance_are_not_trained(hunyuan: Tried) -> None:
    denoiser = hunyuan.family.load(torch.float32).denoiser
    objective = Diffusion(ObjectiveOptions(), hunyuan.family.scheduler_config)
    train.train_step(hunyuan.family, objective, denoiser, hunyuan.batch(), CPU)[0].mean().backward()
    gradient = denoiser.proj_out.weight.grad.reshape(4, 8, -1)  # of each pixel of a patch, by channel
    assert gradient[:, :4].abs().sum() > 0 and not gradient[:, 4:].any()


def test_gradient_checkpointing_runs_every_block_again_and_changes_no_gradient(hunyuan: Tried) -> None:
    objective = Diffusion(ObjectiveOptions(), hunyuan.family.scheduler_config)
    gradients, runs = [], []
    for saves_memory in (False, True):
        denoiser = hunyuan.family.load(torch.float32).denoiser.train()
        seen: list[str] = []
        for block in denoiser.blocks:
            block.attn1.register_forward_hook(lambda *_, seen=seen: seen.append("run"))
        if saves_memory:
            denoiser.enable_gradient_checkpointing()
        train.train_step(hunyuan.family, objective, denoiser, hunyuan.batch(), CPU)[0].mean().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None])
        runs.append(len(seen))
    assert runs == [4, 8]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_positions_are_those_of_the_pipeline_at_every_shape(hunyuan: Tried, size: tuple[int, int]) -> None:
    """One step of the pipeline without guidance, seen from inside."""
    width, height = size
    denoiser = hunyuan.family.load(torch.float32).denoiser.eval()
    seen: list[dict[str, Any]] = []
    denoiser.register_forward_pre_hook(lambda module, arguments, named: seen.append(named), with_kwargs=True)
    pipeline = hunyuan.family.pipeline(denoiser, DDIMScheduler.from_config(dict(hunyuan.family.scheduler_config)))
    pipeline.set_progress_bar_config(disable=True)
    with hunyuan.family.text_encoders(CPU) as encoders:
        text, negative = (without_padding({n: t[0] for n, t in encoders.encode([c]).items()}) for c in ("a photo of a cat", ""))
    arguments = hunyuan.family.prompt_arguments(text, negative)
    made = pipeline(**arguments, width=width, height=height, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    assert made.shape == (1, 4, height // 8, width // 8)
    latents = torch.randn(1, 4, height // 8, width // 8)
    batch = dataclasses.replace(hunyuan.batch(["a photo of a cat"]), latents=latents)
    with torch.no_grad():
        hunyuan.family.predict(denoiser, latents, TIMESTEPS[:1], hunyuan.family.conditioning(batch, CPU))
    theirs, ours = seen
    assert all(torch.equal(one, other) for one, other in zip(ours["image_rotary_emb"], theirs["image_rotary_emb"], strict=True))
    assert theirs["image_meta_size"].tolist() == [[width, height, width, height, 0, 0]]


def test_an_early_copy_is_handed_over_with_a_tokenizer_that_there_is(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """They name a class that transformers no longer has."""
    early = shutil.copytree(miniature("hunyuan_dit"), tmp_path / "early")
    index = json.loads((early / "model_index.json").read_text())
    (early / "model_index.json").write_text(json.dumps({**index, "tokenizer_2": ["transformers", "MT5Tokenizer"]}))
    family = open_family("hunyuan_dit", early, tmp_path / "cache")
    method = FullFineTune(AdapterOptions(), family)
    method.export(method.attach(family.load(torch.float32)), tmp_path / "out", dict(family.scheduler_config), None)
    opened: Any = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert type(opened.tokenizer_2).__name__ == "T5Tokenizer"


def test_a_file_of_the_family_describes_itself(hunyuan: Tried) -> None:
    version = {"hunyuan_dit": "1.2", "hunyuan_dit_11": "1.1"}[hunyuan.miniature]
    assert hunyuan.family.modelspec("lora")["modelspec.architecture"] == f"hunyuan-dit-v{version}/lora"


def test_sides_that_patches_do_not_divide_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="16-pixel patches"):
        read_config(["--hunyuan_dit", "--pretrained_model_name_or_path=someone/model", "--aspect_bucket_alignment=8"], {}, known_axes())
