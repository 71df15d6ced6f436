"""Stable Diffusion 3 and 3.5, with T5 and without: what a step sees and learns, against diffusers and formulas written here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusion3Pipeline
from torch.nn.functional import huber_loss
from transformers import T5TokenizerFast

import train
from helpers.choices import known_axes
from helpers.config.options import ObjectiveOptions
from helpers.config.read import read_config
from helpers.errors import ConfigError, ModelError
from helpers.families.sd3 import StableDiffusion3
from helpers.families.text.clip import ClipOutput
from helpers.families.text.sd3_text import both_pooled, joined
from helpers.families.text.t5 import tokenize
from helpers.objectives.diffusion import Diffusion
from tests.families.conftest import CAPTIONS, CPU, Tried, open_family

OPTIONS = known_axes().options

BOTH = ("sd3", "sd35")
LONG = "a photo of a cat " * 90  # 360 words


def pipeline_of(tried: Tried) -> Any:
    """diffusers insists on hearing that T5 is not there."""
    without: dict[str, Any] = {} if tried.miniature == "sd3" else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(tried.folder, **without)


def encoded(pipeline: Any, captions: list[str], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's embeddings (B, 77 + T5's, D) and pooled outputs (B, P)."""
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(captions, None, None, device=CPU, do_classifier_free_guidance=False, **more)
    return states, pooled


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_captions_are_told_as_the_pipeline_tells_them(tried: Tried) -> None:
    """77 of CLIP, padded with zeros, and 256 of T5, or of zeros where there is none."""
    captions = [*CAPTIONS, LONG]
    ours = tried.family.conditioning(tried.batch(captions), CPU)
    states, pooled = encoded(pipeline_of(tried), captions)
    assert states.shape == (5, 77 + 256, 64) and pooled.shape == (5, 24 + 32)
    assert torch.allclose(ours["prompt_embeds"], states, atol=1e-5)
    assert torch.allclose(ours["pooled"], pooled, atol=1e-5)
    assert not ours["prompt_embeds"][:, :77, 24 + 32 :].any()
    assert ours["prompt_embeds"][:, 77:].any() == (tried.miniature == "sd3")


@pytest.mark.parametrize(("t5_length", "tokens"), [(77, 154), (256, 333)])
def test_the_parts_stand_where_the_network_expects_them(t5_length: int, tokens: int) -> None:
    """At the sizes of the real encoders: 768 of CLIP-L before 1280 of bigG, zeros up to 4096, and T5 behind them along the sequence."""
    one, two, t5 = (
        torch.full((1, length, width), number) for length, width, number in ((77, 768, 1.0), (77, 1280, 2.0), (t5_length, 4096, 3.0))
    )
    pooled = torch.cat([torch.full((1, 768), 4.0), torch.full((1, 1280), 5.0)], dim=1)
    told = joined({"clip": torch.cat([one, two], dim=-1), "t5": t5, "pooled": pooled}, 4096, t5_length)
    assert told["prompt_embeds"].shape == (1, tokens, 4096)
    expected = torch.zeros(1, tokens, 4096)
    expected[:, :77, :768], expected[:, :77, 768:2048], expected[:, 77:] = 1, 2, 3
    assert torch.equal(told["prompt_embeds"], expected) and torch.equal(told["pooled"], pooled)
    without = joined({"clip": torch.cat([one, two], dim=-1), "pooled": pooled}, 4096, t5_length)["prompt_embeds"]
    expected[:, 77:] = 0
    assert torch.equal(without, expected)


def test_both_clip_encoders_stand_side_by_side_in_their_order() -> None:
    answers = [
        ClipOutput(torch.full((1, 77, width), number), torch.full((1, width), -number)) for width, number in ((768, 1.0), (1280, 2.0))
    ]
    parts = both_pooled(answers)
    assert parts["clip"].shape == (1, 77, 2048) and parts["pooled"].shape == (1, 2048)
    assert (parts["clip"][..., :768] == 1).all() and (parts["clip"][..., 768:] == 2).all()
    assert (parts["pooled"][..., :768] == -1).all() and (parts["pooled"][..., 768:] == -2).all()


@pytest.mark.parametrize(
    ("encoder", "states_of_it", "pooled_of_it"),
    [
        ("text_encoder", (slice(77), slice(24)), slice(24)),
        ("text_encoder_2", (slice(77), slice(24, 56)), slice(24, 56)),
        ("text_encoder_3", (slice(77, None), slice(None)), slice(0)),
    ],
)
@pytest.mark.parametrize("tried", ["sd3"], indirect=True)
def test_an_encoder_that_is_not_told_of_a_caption_says_zeros_and_the_others_what_they_said(
    tried: Tried, encoder: str, states_of_it: tuple[slice, slice], pooled_of_it: slice
) -> None:
    batch = tried.batch()
    states, pooled = encoded(pipeline_of(tried), list(CAPTIONS))
    states[0, states_of_it[0], states_of_it[1]] = 0
    pooled[0, pooled_of_it] = 0
    first = tried.family.without({name: tensor[0] for name, tensor in batch.text.items()}, (encoder,))  # type: ignore[attr-defined]
    text = {name: torch.cat([first[name].unsqueeze(0), tensor[1:]]) for name, tensor in batch.text.items()}
    told = tried.family.conditioning(dataclasses.replace(batch, text=text), CPU)
    assert torch.allclose(told["prompt_embeds"], states, atol=1e-5) and torch.allclose(told["pooled"], pooled, atol=1e-5)


@pytest.mark.parametrize(
    ("miniature_name", "how", "expected"),
    [
        ("sd3", "apart", ("text_encoder", "text_encoder_2", "text_encoder_3")),
        ("sd35", "apart", ("text_encoder", "text_encoder_2")),
        ("sd3", "together", ()),
    ],
)
def test_encoders_are_told_apart_unless_the_user_wants_them_together(
    miniature_name: str, how: str, expected: tuple[str, ...], miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    family: Any = open_family("sd3", miniature(miniature_name), tmp_path, sd3_caption_dropout=how)
    assert family.encoders_apart == expected


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_prediction_target_and_loss_are_those_of_flow_matching(tried: Tried) -> None:
    """The expected side: x_s = (1 - s) x_0 + s e, the network of diffusers told 1000 s, and (answer - (e - x_0))^2 with weight 1."""
    batch = tried.batch()
    with torch.no_grad():
        losses, corrupted = train.train_step(tried.family, tried.objective(), tried.family.load(torch.float32).denoiser, batch, CPU)
        pipeline = pipeline_of(tried)
        states, pooled = encoded(pipeline, list(CAPTIONS))
        noise = batch.draws.normal("noise", *batch.latents.shape[1:])
        share = (corrupted.timesteps / 1000).view(-1, 1, 1, 1)
        noisy = (1 - share) * batch.latents + share * noise
        answer = pipeline.transformer(noisy, states, pooled, corrupted.timesteps, return_dict=False)[0]
    assert torch.allclose(corrupted.noisy, noisy, atol=1e-5)
    target = noise - batch.latents
    assert torch.allclose(losses, ((answer - target) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4)
    huber = 2 * huber_loss(answer, target, reduction="none", delta=0.3).mean(dim=(1, 2, 3))
    assert torch.allclose(tried.objective(loss="huber", huber_delta=0.3).loss(answer, corrupted), huber, rtol=1e-4)


BY_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}


def test_by_diffusion_prediction_target_and_loss_are_those_of_diffusers(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    tried = Tried("sd3", miniature("sd3"), open_family("sd3", miniature("sd3"), tmp_path, sd3_uses_diffusion=True))
    batch, objective = tried.batch(), Diffusion(ObjectiveOptions(), tried.family.scheduler_config)
    pipeline = pipeline_of(tried)
    states, pooled = encoded(pipeline, list(CAPTIONS))
    scheduler: Any = DDPMScheduler(**BY_DIFFUSION)
    with torch.no_grad():
        losses, corrupted = train.train_step(tried.family, objective, tried.family.load(torch.float32).denoiser, batch, CPU)
        noise, timesteps = batch.draws.normal("noise", *batch.latents.shape[1:]), corrupted.timesteps
        noisy = scheduler.add_noise(batch.latents, noise, timesteps)
        answer = pipeline.transformer(noisy, states, pooled, timesteps, return_dict=False)[0]
    target = scheduler.get_velocity(batch.latents, noise, timesteps)
    assert torch.allclose(corrupted.noisy, noisy, atol=1e-5)
    assert torch.allclose(losses, ((answer - target) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc", "euler", "euler-a"])
def test_by_diffusion_the_pipeline_samples_rightly_with_the_samplers_that_are_accepted(
    name: str, miniature: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pipeline of diffusers, with a network that always knows the picture: it is shown as much noise as the timestep says."""
    tried = Tried("sd3", miniature("sd3"), open_family("sd3", miniature("sd3"), tmp_path, sd3_uses_diffusion=True))
    objective = Diffusion(ObjectiveOptions(), tried.family.scheduler_config)
    pipeline = pipeline_of(tried)
    pipeline.scheduler = getattr(diffusers, objective.samplers[name]).from_config({**objective.scheduler_config})
    picture = tried.batch(["a cat"]).latents
    abar = DDPMScheduler(**BY_DIFFUSION).alphas_cumprod

    strengths: list[float] = []

    def exact(hidden_states: torch.Tensor, timestep: torch.Tensor, **told: Any) -> tuple[torch.Tensor]:
        signal = abar[timestep.long()].view(-1, 1, 1, 1).sqrt()
        sigma = (1 - signal**2).sqrt()
        noise = (hidden_states - signal * picture) / sigma
        strengths.append(noise.std().item())
        return (signal * noise - sigma * picture,)

    monkeypatch.setattr(pipeline.transformer, "forward", exact)
    made = pipeline(
        "a cat", width=64, height=64, num_inference_steps=20, guidance_scale=1.0, output_type="latent", generator=torch.manual_seed(1)
    ).images
    settings = {key: item.default for key, item in OPTIONS.items()} | {"sd3_uses_diffusion": True, "validation_noise_scheduler": name}
    problems = list(StableDiffusion3.facts.judge(settings))
    assert (strengths == [pytest.approx(1, abs=0.1)] * 20) == (problems == [])
    assert problems or (made - picture).abs().max() < 0.1


@pytest.mark.parametrize("flag", ["--weighting_scheme=mode", "--logit_mean=1", "--flow_shift=2", "--validation_using_datasets"])
def test_what_only_flow_matching_has_is_refused_by_diffusion(flag: str) -> None:
    flags = ["--pretrained_model_name_or_path=some/model", "--model_family=sd3", "--sd3_uses_diffusion", flag]
    with pytest.raises(ConfigError) as caught:
        read_config(flags, {}, known_axes())
    [problem] = [problem for problem in caught.value.problems if problem.startswith(flag.partition("=")[0])]
    assert "flow matching" in problem and "remove" in problem.lower()


def test_t5_reads_as_many_tokens_as_it_is_told(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    family = open_family("sd3", miniature("sd3"), tmp_path, tokenizer_max_length=100)
    tried = Tried("sd3", miniature("sd3"), family)
    ours = family.conditioning(tried.batch([LONG, "a cat"]), CPU)["prompt_embeds"]
    assert torch.allclose(ours, encoded(pipeline_of(tried), [LONG, "a cat"], max_sequence_length=100)[0], atol=1e-5)
    assert family.caption_lengths().limit == 100


@pytest.mark.parametrize(("name", "limit", "cut"), [("sd3", 256, [False, False, True]), ("sd35", 77, [False, True, True])])
def test_a_caption_is_cut_off_where_the_encoder_that_reads_most_stops(
    name: str, limit: int, cut: list[bool], miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    family, captions = open_family("sd3", miniature(name), tmp_path), ["a cat", "cat " * 100, LONG]
    lengths = family.caption_lengths()
    assert lengths.limit == limit
    assert [length > limit for length in lengths.token_counts(captions)] == cut
    with family.text_encoders(CPU) as encoders:
        encoders.encode(captions)
        assert encoders.truncated == sum(cut)


def test_token_ids_of_t5_end_with_its_end_of_text_and_are_those_of_the_pipeline(miniature: Callable[[str], Path]) -> None:
    tokenizer = T5TokenizerFast.from_pretrained(miniature("sd3") / "tokenizer_3")
    ids, mask, too_long = tokenize(tokenizer, ["a cat", LONG], 256)
    theirs = tokenizer(["a cat", LONG], padding="max_length", max_length=256, truncation=True, return_tensors="pt")
    assert torch.equal(ids, theirs.input_ids) and torch.equal(mask, theirs.attention_mask)
    assert ids[0, mask[0].sum() - 1] == tokenizer.eos_token_id
    assert (ids[0, mask[0].sum() :] == tokenizer.pad_token_id).all()
    assert ids[1, -1] == tokenizer.eos_token_id and too_long == 1


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_a_dropped_caption_is_zeros_for_all_encoders(tried: Tried) -> None:
    with tried.family.text_encoders(CPU) as encoders:
        dropped = tried.family.unconditional(encoders)
        assert dropped.keys() == encoders.encode(["a cat"]).keys()
    assert not any(tensor.any() for tensor in dropped.values())


def test_t5_may_be_left_out_by_removing_its_folder_and_is_not_exported_then(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "without"
    shutil.copytree(miniature("sd3"), copy)
    shutil.rmtree(copy / "text_encoder_3")
    family = open_family("sd3", copy, tmp_path / "cache")
    with family.text_encoders(CPU) as encoders:
        assert encoders.encode(["a cat"]).keys() == {"clip", "pooled"}
    family.export_pipeline(
        copy / "transformer", {**family.scheduler_config, "_class_name": "FlowMatchEulerDiscreteScheduler"}, tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["text_encoder_3"] == [None, None]


def test_a_vae_of_another_family_is_refused_before_anything_is_encoded(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="have 4 channels, and .* reads 16"):
        open_family("sd3", miniature("sd3"), tmp_path, pretrained_vae_model_name_or_path=str(miniature("sdxl")))


def test_pictures_are_cut_in_whole_patches(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    assert open_family("sd3", miniature("sd3"), tmp_path).latents.alignment == 16
    assert "use 64" in judged(aspect_bucket_alignment=8)


def judged(**settings: object) -> str:
    known = {**{name: item.default for name, item in OPTIONS.items()}, **StableDiffusion3.facts.defaults}
    return "\n".join(StableDiffusion3.facts.judge({**known, **settings}))


def test_what_its_pipeline_cannot_do_is_refused() -> None:
    assert judged() == ""
    assert "cannot rescale" in judged(validation_guidance_rescale=0.7)
    assert "512 tokens" in judged(tokenizer_max_length=600)
    assert judged(tokenizer_max_length=512) == ""


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_validation_samples_as_the_pipeline_does_from_the_words(tried: Tried) -> None:
    """From our embeddings and theirs, with guidance, the same latents."""
    whole = pipeline_of(tried)
    whole.set_progress_bar_config(disable=True)
    with tried.family.text_encoders(CPU) as encoders:
        text, negative = ({name: tensor[0] for name, tensor in encoders.encode([caption]).items()} for caption in ("a cat", "blurry"))
    ours = tried.family.pipeline(whole.transformer, whole.scheduler)
    ours.set_progress_bar_config(disable=True)
    usual: dict[str, Any] = {"width": 64, "height": 96, "num_inference_steps": 3, "output_type": "latent"}
    found = ours(**tried.family.prompt_arguments(text, negative), generator=torch.Generator().manual_seed(1), **usual).images
    expected = whole("a cat", negative_prompt="blurry", generator=torch.Generator().manual_seed(1), **usual).images
    assert found.shape == (1, 16, 12, 8)
    assert torch.allclose(found, expected, atol=1e-4)
