"""A base model that lacks something is refused when it is opened, with one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.errors import ModelError
from tests.families.conftest import CPU, open_family


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


def without(weights: Path, name: str) -> None:
    tensors = load_file(weights)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})


def test_a_network_that_lacks_a_weight_is_refused_before_anything_is_encoded(model: Path, tmp_path: Path) -> None:
    without(model / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias")
    with pytest.raises(
        ModelError, match=r"The weights in .*unet lack what its config.json asks for \(conv_in.bias\): fetch the model again"
    ):
        open_family("sdxl", model, tmp_path / "cache").load(None)


def test_a_network_of_another_shape_than_its_config_is_refused_before_anything_is_encoded(model: Path, tmp_path: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "conv_in.bias": torch.zeros(9)}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"which makes conv_in.bias \[\d+\] and not \[9\]"):
        open_family("sdxl", model, tmp_path / "cache").load(None)


def test_encoders_that_lack_a_weight_are_not_made_up(model: Path, tmp_path: Path) -> None:
    without(model / "text_encoder" / "model.safetensors", "final_layer_norm.weight")
    without(model / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_in.bias")
    family = open_family("sdxl", model, tmp_path / "cache")
    with family.text_encoders(CPU) as encoders, pytest.raises(ModelError, match="text_encoder lack .*final_layer_norm.weight"):
        encoders.encode(["a cat"])
    with family.image_codec(CPU) as codec, pytest.raises(ModelError, match="vae lack .*conv_in.bias"):
        codec.encode(torch.zeros(1, 3, 32, 32))
