"""A base model that is one file is the same model as the folder it was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.config.options import CacheOptions, ModelOptions
from helpers.errors import ModelError
from helpers.families.recognise import recognise
from helpers.families.tiny import SdxlSizes, write_sdxl
from tests.families.conftest import CPU, Tried, family_name, open_family
from tests.families.original_layout import write_single_file


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_a_single_file_predicts_what_its_folder_predicts(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    folder, cache = miniature(name), tmp_path / "cache"
    if name == "sdxl":  # diffusers tells its two encoders apart by their width
        folder = write_sdxl(tmp_path / "sdxl", sizes=SdxlSizes(text_2_width=48))
    file = write_single_file(folder, tmp_path / "model.safetensors")
    single = Tried(name, file, open_family(family_name(name), file, cache, single_file_config=str(folder)))
    whole = Tried(name, folder, open_family(family_name(name), folder, cache))
    answers = []
    for tried in (single, whole):
        batch = tried.batch()
        denoiser = tried.family.load(torch.float32).denoiser
        with torch.no_grad(), tried.family.image_codec(CPU) as codec:
            conditioning = tried.family.conditioning(batch, CPU)
            pixels = codec.decode(batch.latents)
            answers.append((tried.family.predict(denoiser, batch.latents, torch.tensor([0, 1, 500, 999]), conditioning), pixels))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*answers, strict=True))


def test_a_file_is_converted_once_and_again_when_it_changes(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(miniature("sd1"), tmp_path / "model.safetensors")

    def found() -> set[Path]:
        open_family("sd2x", file, tmp_path / "cache", single_file_config=str(miniature("sd1")))
        return set((tmp_path / "cache" / "converted").iterdir())

    [first] = found()
    made = (first / "model_index.json").stat().st_mtime_ns
    assert found() == {first} and (first / "model_index.json").stat().st_mtime_ns == made
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert len(found()) == 2


def refusal(path: Path, tmp_path: Path, config: Path | None = None) -> str:
    options = ModelOptions(pretrained_model_name_or_path=str(path), single_file_config=str(config) if config else None)
    with pytest.raises(ModelError) as caught:
        recognise("sdxl", options, dataclasses.replace(CacheOptions(), cache_dir=tmp_path / "cache"))
    return str(caught.value)


def test_a_file_of_another_family_names_its_wrapper(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(miniature("sd1"), tmp_path / "model.safetensors")
    assert "it is trained by ./train_sd2x.sh" in refusal(file, tmp_path, miniature("sd1"))


def test_settings_that_cannot_be_fetched_are_asked_for(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """Offline, and without a folder to take them from."""
    file = write_single_file(miniature("sdxl"), tmp_path / "model.safetensors")
    assert "unless --single_file_config names a model folder of the same kind" in refusal(file, tmp_path)
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_files_that_are_no_whole_model_are_named(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, lora)
    assert "is no complete model" in refusal(lora, tmp_path)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x04")
    assert "is no .safetensors file" in refusal(pickled, tmp_path)
    short = write_single_file(miniature("sd1"), tmp_path / "short.safetensors")
    short.write_bytes(short.read_bytes()[:-10])
    assert "is cut off" in refusal(short, tmp_path)
