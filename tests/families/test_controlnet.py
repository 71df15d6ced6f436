"""ControlNets: what diffusers' own classes answer, exactly nothing before the first step, and files that their pipelines load."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, SD3ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from helpers.config.options import AdapterOptions
from helpers.data.batches import Batch
from helpers.errors import ModelError
from helpers.methods.controlnet import ControlNet
from helpers.protocols import Trainable
from tests.families.conftest import CPU, Tried, family_name, open_family
from train import train_step

MINIATURES = ("sd1", "sd2", "sdxl", "sd3", "sd35")
TIMESTEPS = torch.tensor([0, 150, 600, 999])


@pytest.fixture(params=MINIATURES)
def controlled(request: pytest.FixtureRequest, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    return opened(request.param, miniature, tmp_path)


def opened(name: str, miniature: Callable[[str], Path], cache: Path, start: Path | None = None) -> Tried:
    folder = miniature(name)
    options = {"controlnet": True, "controlnet_model_name_or_path": str(start) if start else None}
    return Tried(name, folder, open_family(family_name(name), folder, cache / "cache", **options))


def steered(tried: Tried) -> Batch:
    """Four samples with conditions."""
    batch = tried.batch()
    shape = batch.latents.shape if tried.family.condition_as_latents else (4, 3, 64, 64)  # type: ignore[attr-defined]
    return dataclasses.replace(batch, condition=torch.rand(shape, generator=torch.Generator().manual_seed(9)))


def attached(tried: Tried, spread: float = 0.0) -> Trainable:
    """A ControlNet as it begins, or with weights as training might leave them."""
    method = ControlNet(AdapterOptions(), tried.family)
    torch.manual_seed(4)
    trainable = method.attach(tried.family.load(method.weights_dtype("no", "adamw")))
    generator = torch.Generator().manual_seed(0)
    trainable.put({n: w.detach() + spread * torch.randn(w.shape, generator=generator) for n, w in trainable.parameters.items()})
    return trainable


def answer(tried: Tried, network: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return tried.family.predict(network.eval(), batch.latents, TIMESTEPS, tried.family.conditioning(batch, CPU))


def answer_of_diffusers(
    folder: Path, controlnet: Path, question: dict[str, torch.Tensor], timesteps: torch.Tensor = TIMESTEPS
) -> torch.Tensor:
    """From the files alone, by the classes of diffusers."""
    noisy, text = question["noisy"], question["prompt_embeds"]
    with torch.no_grad():
        if (folder / "transformer").is_dir():
            transformer, control = (
                SD3Transformer2DModel.from_pretrained(folder / "transformer"),
                SD3ControlNetModel.from_pretrained(controlnet),
            )
            told = {"encoder_hidden_states": text, "pooled_projections": question["pooled"], "timestep": timesteps, "return_dict": False}
            [blocks] = control(noisy, controlnet_cond=question["condition"], **told)
            return transformer(noisy, block_controlnet_hidden_states=blocks, **told)[0]
        unet, control = UNet2DConditionModel.from_pretrained(folder / "unet"), ControlNetModel.from_pretrained(controlnet)
        more = (
            {"added_cond_kwargs": {"text_embeds": question["pooled"], "time_ids": question["time_ids"]}} if "time_ids" in question else {}
        )
        down, middle = control(noisy, timesteps, text, controlnet_cond=question["condition"], return_dict=False, **more)
        return unet(noisy, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle, **more).sample


def test_before_the_first_step_it_changes_nothing_at_all(controlled: Tried) -> None:
    batch = steered(controlled)
    network = controlled.family.load(torch.float32).denoiser.requires_grad_(False)  # frozen ones are multiplied by other kernels
    alone = answer(controlled, network, dataclasses.replace(batch, condition=None))
    assert torch.equal(answer(controlled, attached(controlled).denoiser, batch), alone)


def test_trained_weights_answer_as_the_classes_of_diffusers_do_from_the_files(controlled: Tried, tmp_path: Path) -> None:
    batch, trainable = steered(controlled), attached(controlled, spread=0.02)
    written = ControlNet(AdapterOptions(), controlled.family).export(trainable, tmp_path / "out", {}, None)
    assert written == [tmp_path / "out" / "controlnet"]
    question = {"noisy": batch.latents, **controlled.family.conditioning(batch, CPU)}
    live = answer(controlled, trainable.denoiser, batch)
    assert (live - answer_of_diffusers(controlled.folder, written[0], question)).abs().max() < 1e-5
    unsteered = answer(controlled, controlled.family.load(torch.float32).denoiser, dataclasses.replace(batch, condition=None))
    assert (live - unsteered).abs().max() > 1e-3


def test_the_loss_of_a_step_is_that_of_the_classes_of_diffusers(controlled: Tried, tmp_path: Path) -> None:
    """Of what the network was asked, the right answer and the mean of squares are computed here from the latents and the schedule."""
    batch, trainable = steered(controlled), attached(controlled, spread=0.02)
    [folder] = ControlNet(AdapterOptions(), controlled.family).export(trainable, tmp_path / "out", {}, None)
    with torch.no_grad():
        losses, asked = train_step(controlled.family, controlled.objective(), trainable.denoiser, batch, CPU)
    question = {**controlled.family.conditioning(batch, CPU), "noisy": asked.noisy}
    given = answer_of_diffusers(controlled.folder, folder, question, asked.timesteps)
    if controlled.family.facts.objective == "flow":  # x_t = (1 - s) x + s e, and the answer is e - x
        sigma = (asked.timesteps / 1000).view(-1, 1, 1, 1)
        target = (asked.noisy - batch.latents) / sigma
    else:
        schedule = DDPMScheduler.from_pretrained(controlled.folder / "scheduler")
        kept = schedule.alphas_cumprod[asked.timesteps].view(-1, 1, 1, 1)
        noise = (asked.noisy - kept.sqrt() * batch.latents) / (1 - kept).sqrt()
        velocity = schedule.config.prediction_type == "v_prediction"
        target = kept.sqrt() * noise - (1 - kept).sqrt() * batch.latents if velocity else noise
    torch.testing.assert_close(losses, (given - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_every_weight_that_moves_has_a_gradient_and_first_the_zero_layers_do(controlled: Tried) -> None:
    """One without would be waited for in vain where several processes train."""
    batch, trainable = steered(controlled), attached(controlled)
    objective = controlled.objective()
    corrupted = objective.corrupt(batch.latents, batch.draws)
    told = controlled.family.conditioning(batch, CPU)
    objective.loss(controlled.family.predict(trainable.denoiser, corrupted.noisy, corrupted.timesteps, told), corrupted).mean().backward()
    assert not [name for name, weights in trainable.parameters.items() if weights.grad is None]
    moved = {name for name, weights in trainable.parameters.items() if weights.grad is not None and weights.grad.any()}
    zeros = {
        name for name in trainable.parameters if name.startswith(("controlnet_blocks", "controlnet_down_blocks", "controlnet_mid_block"))
    }
    assert zeros and moved == {name for name in trainable.parameters if name in zeros}
    assert not any(weights.grad is not None for weights in trainable.denoiser.denoiser.parameters())


def test_gradient_checkpointing_changes_no_gradient(controlled: Tried) -> None:
    batch, found = steered(controlled), []
    for checkpointed in (False, True):
        trainable = attached(controlled, spread=0.02)
        if checkpointed:
            trainable.denoiser.enable_gradient_checkpointing()
        told = controlled.family.conditioning(batch, CPU)
        controlled.family.predict(trainable.denoiser, batch.latents, TIMESTEPS, told).square().mean().backward()
        found.append([weights.grad for weights in trainable.parameters.values()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_network_is_kept_small_and_the_controlnet_as_the_optimiser_wants_it(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    tried = opened("sdxl", miniature, tmp_path)
    for optimizer, expected in (("adamw", torch.float32), ("adamw_bf16", torch.bfloat16)):
        method = ControlNet(AdapterOptions(), tried.family)
        parts = tried.family.load(method.weights_dtype("bf16", optimizer))
        parts.frozen_dtype = torch.bfloat16
        both = method.attach(parts).denoiser
        assert {weights.dtype for weights in both.denoiser.parameters()} == {torch.bfloat16}
        assert {weights.dtype for weights in both.controlnet.parameters()} == {expected}


# -- beginning with one that is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_training_goes_on_from_a_controlnet_that_was_handed_over(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    tried = opened(name, miniature, tmp_path)
    trained = attached(tried, spread=0.02)
    ControlNet(AdapterOptions(), tried.family).export(trained, tmp_path / "out", {}, None)
    again = opened(name, miniature, tmp_path, start=tmp_path / "out")
    batch = steered(tried)
    assert torch.equal(answer(again, attached(again).denoiser, batch), answer(tried, trained.denoiser, batch))


def test_a_controlnet_whose_config_asks_for_it_is_told_no_pooled_text_and_latents_without_the_shift(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    tried = opened("sd3", miniature, tmp_path)
    trainable = attached(tried, spread=0.02)
    [folder] = ControlNet(AdapterOptions(), tried.family).export(trainable, tmp_path / "out", {}, None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "force_zeros_for_pooled_projection": True}))
    other = opened("sd3", miniature, tmp_path, start=folder)
    batch = steered(other)
    vae = json.loads((tried.folder / "vae" / "config.json").read_text())
    shift = vae["shift_factor"] * vae["scaling_factor"]
    question = {"noisy": batch.latents, **tried.family.conditioning(batch, CPU)}
    control, transformer = SD3ControlNetModel.from_pretrained(folder), SD3Transformer2DModel.from_pretrained(tried.folder / "transformer")
    told = {"encoder_hidden_states": question["prompt_embeds"], "timestep": TIMESTEPS, "return_dict": False}
    with torch.no_grad():
        pooled = torch.zeros_like(question["pooled"])
        [blocks] = control(batch.latents, controlnet_cond=question["condition"] + shift, pooled_projections=pooled, **told)
        [expected] = transformer(batch.latents, pooled_projections=question["pooled"], block_controlnet_hidden_states=blocks, **told)
    assert (answer(other, attached(other).denoiser, batch) - expected).abs().max() < 1e-5


def test_a_controlnet_of_another_network_is_refused_with_the_reason(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("sd1", "sd3"):
        tried = opened(name, miniature, tmp_path)
        ControlNet(AdapterOptions(), tried.family).export(attached(tried), tmp_path / name, {}, None)
    with pytest.raises(
        ModelError,
        match=r"controlnet_model_name_or_path: .*sd1.* is for another base model: its down_block_types is .*, and the base model's is",
    ):
        opened("sdxl", miniature, tmp_path, start=tmp_path / "sd1")
    with pytest.raises(ModelError, match="contains SD3ControlNetModel, but this base model needs a ControlNetModel"):
        opened("sdxl", miniature, tmp_path, start=tmp_path / "sd3")
    with pytest.raises(ModelError, match="is no folder here, and of a model of this name"):
        opened("sdxl", miniature, tmp_path, start=tmp_path / "nowhere")
    weights = tmp_path / "sd1" / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, weights)
    with pytest.raises(ModelError, match=r"^--controlnet_model_name_or_path: .*sd1.* lack what its config.json asks for \(conv_in.bias\)"):
        attached(opened("sd1", miniature, tmp_path, start=tmp_path / "sd1"))
    save_file({**tensors, "of_another": tensors["conv_in.bias"].clone()}, weights)
    with pytest.raises(ModelError, match=r"do not match its config.json: of_another"):
        attached(opened("sd1", miniature, tmp_path, start=tmp_path / "sd1"))
    for name in ("sd1", "sd3"):
        [weights] = (tmp_path / name / "controlnet").glob("*.safetensors")
        tensors = load_file(weights)
        first = min(tensors)
        save_file({**tensors, first: torch.full_like(tensors[first], float("nan"))}, weights)
        with pytest.raises(ModelError, match=f"{name}/controlnet/.* holds numbers that are not finite, in {first}"):
            opened(name, miniature, tmp_path, start=tmp_path / name)


# -- in the pipelines of diffusers --------------------------------------------------------------------------------------------

ELSEWHERE = """
import importlib.util, json, pathlib, sys
assert importlib.util.find_spec("helpers") is None, "this interpreter must not know the project"
import diffusers, torch
from PIL import Image
from safetensors.torch import load_file

made = {}
for place in map(pathlib.Path, sys.argv[1:]):
    known = load_file(place / "known.safetensors")
    transformer = place.name.startswith("sd3")
    kind = {"sd1": "StableDiffusion", "sd2": "StableDiffusion", "sdxl": "StableDiffusionXL"}.get(place.name, "StableDiffusion3")
    control = (diffusers.SD3ControlNetModel if transformer else diffusers.ControlNetModel).from_pretrained(place / "controlnet")
    model = (place / "model").read_text()
    index = json.loads((pathlib.Path(model) / "model_index.json").read_text())
    absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]]
    pipeline = getattr(diffusers, f"{kind}ControlNetPipeline").from_pretrained(model, controlnet=control, **dict.fromkeys(absent))
    sampler = diffusers.FlowMatchEulerDiscreteScheduler if transformer else diffusers.DDIMScheduler
    pipeline.scheduler = sampler.from_config(json.loads((place / "scheduler.json").read_text()))
    pipeline.set_progress_bar_config(disable=True)
    if transformer:  # the pipeline draws from the posterior, and training takes its mean
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mean
    picture = Image.fromarray((known["condition"] * 255).round().byte().permute(1, 2, 0).numpy())
    text = {name.partition(" ")[2]: value for name, value in known.items() if name.startswith("argument ")}
    given = {"control_image" if transformer else "image": picture, "width": 64, "height": 64, "num_inference_steps": 2}
    latents = pipeline(**text, **given, guidance_scale=3.0, generator=torch.Generator().manual_seed(3), output_type="latent").images
    made[place.name] = (latents - known["latents"]).abs().max().item()
print(json.dumps(made))
"""


@pytest.mark.slow
def test_what_is_handed_over_makes_the_validation_pictures_in_the_pipelines_of_diffusers_elsewhere(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """In a fresh interpreter, from a picture file's pixels: the condition is prepared there as it is here, whatever the family."""
    from helpers.families.networks.samplers import sampler

    names = ("sd1", "sdxl", "sd3", "sd35")
    for name in names:
        tried, place = opened(name, miniature, tmp_path), tmp_path / name
        trainable = attached(tried, spread=0.02)
        ControlNet(AdapterOptions(), tried.family).export(trainable, place, {}, None)
        pixels = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(7)) * 255).round() / 255
        condition = pixels
        if tried.family.condition_as_latents:  # type: ignore[attr-defined]
            with tried.family.image_codec(CPU) as codec:
                condition = codec.encode(pixels.unsqueeze(0) * 2 - 1)["mean"][0]
        with tried.family.text_encoders(CPU) as encoders:
            text = {key: tensor[0] for key, tensor in encoders.encode(["a red circle"]).items()}
            arguments = tried.family.prompt_arguments(text, tried.family.unconditional(encoders))
        objective = tried.objective()
        schedule = sampler(objective.samplers["euler" if "sd3" in name else "ddim"], objective.scheduler_config, "trailing")
        pipeline = tried.family.pipeline(trainable.denoiser.eval(), schedule)
        pipeline.set_progress_bar_config(disable=True)
        both: Any = trainable.denoiser
        given = {both.argument: both.prepared(condition.unsqueeze(0)), "width": 64, "height": 64, "num_inference_steps": 2}
        latents = pipeline(
            **arguments, **given, guidance_scale=3.0, generator=torch.Generator().manual_seed(3), output_type="latent"
        ).images
        known = {"latents": latents, "condition": pixels, **{f"argument {key}": value.contiguous() for key, value in arguments.items()}}
        save_file({key: value.contiguous() for key, value in known.items()}, place / "known.safetensors")
        (place / "model").write_text(str(tried.folder))
        (place / "scheduler.json").write_text(json.dumps(dict(schedule.config), default=str))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences.keys() == set(names) and max(differences.values()) < 1e-4, differences
