"""A base model that lacks something is refused when it is opened, with one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.errors import ModelError
from tests.families.conftest import open_family


@pytest.fixture
def model(miniature: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the miniature SDXL, to break."""
    return shutil.copytree(miniature("sdxl"), tmp_path / "model")


def refusal(model: Path, tmp_path: Path, **options: str) -> str:
    with pytest.raises(ModelError) as caught:
        open_family("sdxl", model, tmp_path / "cache", **options)
    return str(caught.value)


def test_weights_of_a_variant_alone_are_opened_by_its_name(model: Path, tmp_path: Path) -> None:
    for component in ("unet", "text_encoder_2"):
        for path in (model / component).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    assert refusal(model, tmp_path) == f"The weights in {model / 'unet'} are there as fp16 alone: set --variant=fp16."
    assert "set --variant=fp16" in refusal(model, tmp_path, variant="bf16")
    open_family("sdxl", model, tmp_path / "cache", variant="fp16")


def test_a_network_without_weights_is_named(model: Path, tmp_path: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert refusal(model, tmp_path) == f"There are no weights in {model / 'unet'}: fetch the model again."
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert refusal(model, tmp_path) == f"{model / 'unet' / 'one.safetensors'} is missing: fetch the model again."


def test_a_vae_that_is_not_used_need_not_be_there(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "vae", tmp_path / "vae")
    assert "has no vae folder" in refusal(model, tmp_path)
    open_family("sdxl", model, tmp_path / "cache", pretrained_vae_model_name_or_path=str(tmp_path / "vae"))


def test_a_tokenizer_without_a_vocabulary_is_named(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (model / "tokenizer_2" / name).unlink()
    assert f"The tokenizer in {model / 'tokenizer_2'} is without its vocabulary" in refusal(model, tmp_path)
