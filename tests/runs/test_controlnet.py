"""Whole runs that train a ControlNet: stopped, gone on, on two processes, with images that follow conditions, and refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from tests.harness import Trainer
from tests.runs.evidence import refusal
from toolkit.cache.command import main as cache

USUAL: dict[str, object] = {
    "model_type": "full",
    "controlnet": True,
    "learning_rate": 1e-3,
    "lora_dropout": None,
    "max_train_steps": 4,
    "validation_prompt": None,
    "validation_steps": 0,
}


@pytest.fixture
def steered(trainer: Trainer) -> Trainer:
    """The images' edges at half their size, as another dataset."""
    edges = trainer.folder / "edges"
    edges.mkdir()
    for place in trainer.images.glob("*.png"):
        image = Image.open(place)
        outline = image.filter(ImageFilter.FIND_EDGES).resize((image.width // 2, image.height // 2))
        outline.save(edges / place.with_suffix(".webp").name, lossless=True)
    path = trainer.dataloader(conditioning_data="edges")
    conditions = {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": str(edges)}
    path.write_text(json.dumps([*json.loads(path.read_text()), conditions]))
    return trainer


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_stopped_on_two_processes_and_gone_on_with_on_one_it_ends_in_the_same_bytes(
    steered: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = steered.finish("undisturbed", **{**USUAL, "validation_prompt": "a red circle", "validation_disable_unconditional": False})
    kept = bytes_of(undisturbed.folder / "checkpoint-4")
    weights = "diffusion_pytorch_model.safetensors"
    assert kept.keys() == {f"controlnet/{weights}", f"controlnet_live/{weights}", "optimizer.safetensors"}
    assert (undisturbed.folder / "controlnet" / weights).is_file() and (undisturbed.folder / "controlnet_live" / weights).is_file()
    names = {path.stem.split("_", 2)[2].rpartition("_")[0] for path in (undisturbed.folder / "validation_images").glob("step_4_*.png")}
    assert names == {"unconditional", "validation", "picture_1", "picture_2", "picture_3", "picture_4"}
    for path in (undisturbed.folder / "validation_images").glob("step_*.png"):
        width, height = map(int, path.stem.rpartition("_")[2].split("x"))
        assert Image.open(path).size == (2 * width, height), "the condition stands to the left"
    image = next(steered.images.glob("*.png"))
    assert cache(["why", str(image), f"--output_dir={undisturbed.folder}"]) == 0
    assert cache(["gc", f"--output_dir={undisturbed.folder}"]) == 0
    assert "is current: the next start uses this entry" in (told := capsys.readouterr().out) and "\n0 records, 0.00 MB not needed" in told
    halves = {**USUAL, "gradient_accumulation_steps": 1}
    pair = steered.finish_on(2, "stopped", **{**halves, "max_train_steps": 2})
    assert bytes_of(pair.folder / "checkpoint-2") == bytes_of(undisturbed.folder / "checkpoint-2")
    resumed = steered.finish("stopped", **halves)
    assert bytes_of(resumed.folder / "checkpoint-4") == kept
    first = sorted((steered.folder / "edges").iterdir())[0]
    Image.open(first).rotate(180).save(first, lossless=True)
    changed = steered.run("stopped", **{**USUAL, "max_train_steps": 6})
    assert "accept_changed_data" in refusal(changed) and "images" in refusal(changed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "lora", "lora_dropout": 0.1}, "--controlnet trains a ControlNet, and --model_type=lora an adapter"),
        ({"use_bitfit": True}, "--freeze_unet_strategy=bitfit trains the network's biases, and --controlnet freezes the network"),
        ({"model_family": "pixart_sigma"}, "--controlnet is not for PixArt"),
        ({"validation_guidance_rescale": 0.5}, "--validation_guidance_rescale is not for --controlnet"),
        ({"controlnet_model_name_or_path": "./nowhere"}, "--controlnet_model_name_or_path: there is no folder ./nowhere"),
    ],
)
def test_what_cannot_be_trained_with_a_controlnet_is_refused_at_once(settings: dict[str, object], said: str, steered: Trainer) -> None:
    assert said in steered.run(**{**USUAL, **settings}).printed
