"""Sampling with two experts: which network is used at which timestep, and which runs make a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.errors import EXIT_REFUSED, UserError
from helpers.storage.atomic import write_json
from toolkit.inference import experts
from toolkit.inference.experts import Expert
from toolkit.inference.two_experts import TwoExperts

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "model"
PROMPT = "a red circle on a blue background"


class Named(nn.Module):
    """Returns its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.config = {"name": name}

    def forward(self, sample: Any, timestep: Any, extra: str = "") -> str:
        return self.name + extra


@pytest.mark.parametrize("timestep", [200, 200.5, 999, torch.tensor(200), torch.tensor([999, 999])])
def test_the_first_expert_is_used_from_the_border_up(timestep: Any) -> None:
    assert TwoExperts(Named("early"), Named("late"), 200)(None, timestep) == "early"


@pytest.mark.parametrize("timestep", [0, 199, 199.9, torch.tensor(199), torch.tensor([0, 0])])
def test_the_second_expert_is_used_below_the_border(timestep: Any) -> None:
    assert TwoExperts(Named("early"), Named("late"), 200)(None, timestep) == "late"


def test_a_named_timestep_works_too_and_other_attributes_are_the_first_experts() -> None:
    both = TwoExperts(Named("early"), Named("late"), 200)
    assert both(sample=None, extra="!", timestep=3) == "late!"
    assert both.config == {"name": "early"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = both.nothing


def other_unet() -> UNet2DConditionModel:
    """The demo's network, slightly changed."""
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", torch_dtype=torch.float32)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    return unet


def test_both_sample_like_the_two_pipelines_of_sdxl_in_sequence() -> None:
    """Expected: diffusers' own switch from base to refiner at 80 % of the schedule."""
    usual: dict[str, Any] = {"num_inference_steps": 10, "output_type": "latent"}
    first = StableDiffusionXLPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, add_watermarker=False)
    second = StableDiffusionXLImg2ImgPipeline(**{**first.components, "unet": other_unet()}, add_watermarker=False)
    begun = first(PROMPT, width=64, height=64, denoising_end=0.8, generator=torch.manual_seed(1), **usual).images
    expected = second(PROMPT, image=begun, denoising_start=0.8, guidance_scale=5.0, **usual).images
    alone = first(PROMPT, width=64, height=64, generator=torch.manual_seed(1), **usual).images
    first.unet = TwoExperts(first.unet, other_unet(), 200)
    together = first(PROMPT, width=64, height=64, generator=torch.manual_seed(1), **usual).images
    assert torch.allclose(together, expected, atol=1e-4)
    assert not torch.allclose(together, alone, atol=1e-2)


def settings(*flags: str) -> Config:
    usual = ("--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json", "--model_type=full")
    return read_config([*usual, *flags], {}, known_axes())


@pytest.fixture
def expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a folder of this name with a finished run with these flags."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("data.json").write_text(json.dumps([{"id": "mine", "instance_data_dir": "images"}]))

    def finished(name: str, *flags: str) -> Path:
        (tmp_path / name / "pipeline").mkdir(parents=True)
        write_json(tmp_path / name / "config.json", settings("--refiner_training", *flags).to_json())
        return tmp_path / name

    return finished


INVERTED = "--refiner_training_invert_schedule"
PIXART = "--model_family=pixart_sigma"


def test_the_order_of_the_folders_does_not_matter(expert: Any) -> None:
    first, second = Expert.open(expert("first", INVERTED)), Expert.open(expert("second"))
    assert experts.in_order(first, second) == experts.in_order(second, first) == (first, second)


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ((), (), "both trained on the end of the schedule"),
        ((INVERTED,), (INVERTED,), "both trained on the beginning"),
        ((INVERTED,), ("--refiner_training_strength=0.3",), "have two experts or none"),
        ((INVERTED,), ("--model_family=sd2x",), "belongs to the model family sdxl and .* to sd2x"),
        ((INVERTED, PIXART, "--pretrained_t5_model_name_or_path=a/t5"), (PIXART,), "the T5 of a/t5 and .* with that of its base model"),
    ],
)
def test_experts_that_do_not_make_one_schedule_are_refused_with_the_reason(
    one: tuple[str, ...], other: tuple[str, ...], reason: str, expert: Any
) -> None:
    with pytest.raises(UserError, match=reason):
        experts.in_order(Expert.open(expert("one", *one)), Expert.open(expert("other", *other)))


def test_what_is_not_a_finished_expert_is_refused(expert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = expert("first", INVERTED)
    whole = expert("whole")
    write_json(whole / "config.json", settings().to_json())
    unfinished = expert("unfinished")
    (unfinished / "pipeline").rmdir()
    (tmp_path / "empty").mkdir()
    reasons = {"whole": "it is not an expert", "unfinished": "let the run finish", "empty": "holds no config.json"}
    for name, reason in reasons.items():
        command = [str(first), str(tmp_path / name), "--prompt", "a cat", "--output_dir", "out"]
        assert experts.main(command) == EXIT_REFUSED
        assert reason in capsys.readouterr().err


def test_a_lora_is_sampled_with_the_t5_and_the_vae_that_it_was_trained_with(expert: Any, tmp_path: Path) -> None:
    from helpers.config.options import AdapterOptions
    from helpers.families.miniatures.pixart import write_pixart_sigma
    from helpers.methods.lora import Lora
    from tests.families.conftest import open_family

    model, source = write_pixart_sigma(tmp_path / "model"), write_pixart_sigma(tmp_path / "source", seed=1)
    others = (f"--pretrained_t5_model_name_or_path={source}", f"--pretrained_vae_model_name_or_path={source}")
    of_model = (f"--pretrained_model_name_or_path={model}", *others)
    folder = expert("first", INVERTED, "--model_family=pixart_sigma", "--model_type=lora", *of_model)
    (folder / "pipeline").rmdir()
    method = Lora(AdapterOptions(), open_family("pixart_sigma", model, tmp_path / "cache"))
    method.export(method.attach(method.family.load(torch.float32)), folder, {}, None)
    pipeline = Expert.open(folder).load("fp32", "cpu")
    for part in ("text_encoder", "vae"):
        expected = type(getattr(pipeline, part)).from_pretrained(source / part).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in getattr(pipeline, part).state_dict().items())
    shared = {name: part for name, part in pipeline.components.items() if name != "transformer"}
    again = Expert.open(folder).load("fp32", "cpu", **shared)
    assert again.text_encoder is pipeline.text_encoder and again.vae is pipeline.vae
