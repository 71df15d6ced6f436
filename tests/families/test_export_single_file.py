"""A full fine-tune as one file: diffusers opens it with the trained weights, it says what it predicts, and a LoRA can be merged into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.config.options import AdapterOptions
from helpers.errors import ModelError
from helpers.families.loading.file_facts import read_facts
from helpers.families.lora.merge import merge_into_folder
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl
from helpers.families.original.single_file import modelspec_of_model, write_single_file
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from tests.families.conftest import Tried, family_name, open_family
from tests.families.test_exports import changed, everywhere
from tests.families.test_single_file import as_released

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl_refiner": "stable-diffusion-xl-v1-refiner",
    "sd3": "stable-diffusion-3",
    "sd35": "stable-diffusion-3",
}


@pytest.fixture
def folder_of(miniature: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if name == "sdxl":  # diffusers tells its two encoders apart by their width
            return write_sdxl(tmp_path / "model", sizes=SdxlSizes(text_2_width=48))
        return as_released(miniature(name), tmp_path / "model") if name in ("sd3", "sd35") else miniature(name)

    return folder


def fine_tuned(family: Any, target: Path, **schedule: Any) -> dict[str, torch.Tensor]:
    """Export `pipeline/` of a fine-tune => the trained weights."""
    method = FullFineTune(AdapterOptions(), family)
    trainable = changed(method.attach(family.load(torch.float32)), 0.02)
    sampler = "FlowMatchEulerDiscreteScheduler" if "sd3" in family.facts.name else "EulerDiscreteScheduler"
    method.export(trainable, target, {**family.scheduler_config, **schedule, "_class_name": sampler}, None)
    return {name: tensor.clone() for name, tensor in trainable.denoiser.state_dict().items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_tools_find_the_trained_weights_and_what_they_predict(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers' reader of single files finds every weight bit for bit; the file says what a run that starts from it trains."""
    folder = folder_of(name)
    family = open_family(family_name(name), folder, tmp_path / "cache")
    velocity = name == "sdxl"
    trained = fine_tuned(family, tmp_path / "out", **(ZERO_SNR if velocity else {}))
    file = write_single_file(tmp_path / "out" / "pipeline", tmp_path / "pipeline.safetensors", modelspec_of_model(family.modelspec("")))
    with safe_open(file, "pt") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
    assert metadata["modelspec.architecture"] == ARCHITECTURES[name]
    assert {"v_pred", "ztsnr"} <= names if velocity else "ztsnr" not in names
    assert metadata.get("modelspec.prediction_type") == {"sdxl": "v", "sd2": "v", "sd3": None, "sd35": None}.get(name, "epsilon")
    again = open_family(family_name(name), file, tmp_path / "cache", single_file_config=str(folder))
    found = again.load(torch.float32).denoiser.state_dict()
    assert found.keys() == trained.keys() and all(torch.equal(found[key], tensor) for key, tensor in trained.items())
    if velocity:
        assert ZERO_SNR.items() <= again.scheduler_config.items()
    [made] = (tmp_path / "cache" / "converted").iterdir()
    facts = read_facts(made)
    assert facts is not None and not any(note.startswith("warning") for note in facts.notes)


@pytest.mark.parametrize(("name", "chosen"), [("sd1", {}), ("sd1", {"use_dora": True}), ("sd3", {"use_rslora": True})], ids=str)
def test_a_lora_is_merged_into_every_layer_that_it_changes(
    name: str, chosen: dict[str, Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(name)
    family = open_family(family_name(name), folder, tmp_path / "cache")
    targets = everywhere(Tried(name, folder, family))
    options = dataclasses.replace(AdapterOptions(), lora_rank=4, lora_alpha=8.0, lora_targets=targets, **chosen)
    method = Lora(options, family)
    trainable = changed(method.attach(family.load(torch.float32)), 0.05)
    files = method.save(trainable, tmp_path / "lora")
    layers = {place: layer for place, layer in trainable.denoiser.named_modules() if isinstance(layer, LoraLayer)}
    for path, strength in ((files[0], 1.0), *(((files[1], 0.5),) if not chosen.get("use_dora") else ())):
        target = merge_into_folder(family, path, folder, tmp_path / f"merged {strength}", strength)
        network = open_family(family_name(name), target, tmp_path / "cache").load(torch.float32).denoiser
        for place, layer in layers.items():
            base = layer.get_base_layer().weight.detach().clone()
            change = layer.get_delta_weight("default").detach()
            expected = base + strength * change
            if chosen.get("use_dora"):
                rows = [-1, *[1] * (base.ndim - 1)]
                magnitude = layer.lora_magnitude_vector["default"].weight.detach().reshape(rows)
                expected = magnitude * expected / expected.flatten(1).norm(dim=1).reshape(rows)
            assert torch.allclose(network.get_submodule(place).weight, expected, atol=1e-6), place
    with safe_open(files[0], "pt") as file:
        metadata = file.metadata()
    stored = load_file(files[0])
    save_file(
        {key.replace("proj_in", "proj_elsewhere"): tensor for key, tensor in stored.items()}, tmp_path / "other.safetensors", metadata
    )
    if name == "sd1":
        with pytest.raises(ModelError, match=r"layers that unet does not have, such as .*proj_elsewhere"):
            merge_into_folder(family, tmp_path / "other.safetensors", folder, tmp_path / "never")
        assert not (tmp_path / "never").exists()
