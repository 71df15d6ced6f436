"""A run of each family that the SDXL runs of tests/runs do not cover, as users have it: a wrapper, a miniature, a few steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Trainer, draw_images, succeeded
from tests.runs.evidence import unwrapped
from tests.warm_python import warm_python

LORA = {"pytorch_lora_weights.safetensors", "pytorch_lora_weights.kohya.safetensors"}
LONG = pytest.mark.skipif(
    not os.environ.get("SIMPLETUNER_TEST_LONG"), reason="SIMPLETUNER_TEST_LONG=1 runs it; version 2 takes the same path"
)
WRAPPER = "train_sd2x.sh"  # of DeepFloyd
SWITCHES = ("pixart_sigma", "pixart_alpha", "hunyuan_dit")  # of train_sdxl.sh; SDXL's family is the one it trains without
SHORT = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "validation_steps": 0,
    "validation_disable_unconditional": False,
    "gradient_accumulation_steps": 1,
    "use_ema": False,
    "learning_rate": 1e-3,
    "gradient_checkpointing": True,
    "validation_resolution": "64",
}


def weights(folder: Path) -> list[bytes]:
    """Of what a run handed over."""
    return [path.read_bytes() for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pipeline/unet/*.safetensors")])]


def family_of(wrapper: str) -> dict[str, str]:
    """What a wrapper sets."""
    return {"SIMPLETUNER_FAMILY": wrapper.removeprefix("train_").removesuffix(".sh")}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "images", 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrapper", "method", "made"),
    [
        pytest.param("sd1", "train_sd2x.sh", "lora", LORA, marks=LONG),
        ("sd2", "train_sd2x.sh", "full", {"pipeline"}),
        ("sdxl_refiner", "train_sdxl.sh", "lora", LORA),
        ("sd3", "train_sd3.sh", "full", {"pipeline"}),
        ("sd35", "train_sd3.sh", "lora", {"pytorch_lora_weights.safetensors"}),
        ("pixart_sigma", "train_sdxl.sh", "lora", {*LORA, "pytorch_lora_weights.peft"}),
        pytest.param("hunyuan_dit", "train_sdxl.sh", "lora", {*LORA, "pytorch_lora_weights.peft"}, marks=LONG),
        pytest.param("pixart_alpha", "train_sdxl.sh", "full", {"pipeline"}, marks=LONG),
    ],
)
def test_a_run_through_the_wrapper_trains_resumes_and_hands_over(
    name: str, wrapper: str, method: str, made: set[str], miniature: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    switch = {name: True} if name in SWITCHES else {}
    trainer = Trainer(images, tmp_path, miniature(name), {**SHORT, "model_type": method, **switch})
    succeeded(trainer.run_plain(wrapper=wrapper, python=warm_python(), max_train_steps=1))
    ended = trainer.finish(variables=family_of(wrapper))
    assert "resuming from checkpoint-1" in ended.printed
    assert [row["step"] for row in ended.rows("metrics.jsonl")] == [1, 2]
    assert made <= {path.name for path in ended.folder.iterdir()}
    assert ("the base model has no T5" in unwrapped(ended.printed)) == (name == "sd35")
    refines = name == "sdxl_refiner"
    timesteps = [row["timestep"] for row in ended.rows("samples.jsonl")]
    assert (max(timesteps) < 200) == refines
    images_made = {path.name.split("_", 2)[2] for path in (ended.folder / "validation_images").glob("step_2_*.png")}
    if refines:
        assert {picture.rsplit("_", 1)[0] for picture in images_made} == {f"picture_{number}" for number in range(1, 5)}
        assert "SDXL refiner, by its model_index.json · refiner_training true" in unwrapped(ended.printed)
    else:
        assert images_made == {"unconditional_64x64.png", "validation_64x64.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model_type", "made"),
    [
        pytest.param("deepfloyd_1", "deepfloyd-full", "pipeline", marks=LONG),
        pytest.param("deepfloyd_1", "deepfloyd-lora", "pytorch_lora_weights.safetensors", marks=LONG),
        ("deepfloyd_2", "deepfloyd-stage2", "pipeline"),
        pytest.param("deepfloyd_2", "deepfloyd-stage2-lora", "pytorch_lora_weights.safetensors", marks=LONG),
    ],
)
def test_a_stage_of_deepfloyd_trains_through_its_wrapper_and_resumes_to_the_bit(
    name: str, model_type: str, made: str, miniature: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    size = {"resolution": 32, "validation_resolution": "32"}
    trainer = Trainer(images, tmp_path, miniature(name), {**SHORT, "model_type": model_type, **size})
    trainer.dataloader(resolution=32)
    undisturbed = trainer.finish("whole", variables=family_of(WRAPPER))
    succeeded(trainer.run_plain(wrapper=WRAPPER, python=warm_python(), max_train_steps=1))
    ended = trainer.finish(variables=family_of(WRAPPER))
    assert "resuming from checkpoint-1" in ended.printed
    assert ended.losses == undisturbed.losses
    assert (ended.folder / made).exists() and weights(ended.folder) == weights(undisturbed.folder) != []
    assert json.loads((ended.folder / "config.json").read_text())["family"] == name
    images_made = {path.name.split("_", 2)[2] for path in (ended.folder / "validation_images").glob("step_2_*.png")}
    if name == "deepfloyd_2":  # of the data, made smaller and larger again
        assert {picture.rsplit("_", 1)[0] for picture in images_made} == {f"picture_{number}" for number in range(1, 5)}
        assert "is validated on dataset images with their captions" in unwrapped(ended.printed)
    else:
        assert images_made == {"unconditional_32x32.png", "validation_32x32.png"}
