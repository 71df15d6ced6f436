"""A run can start from a LoRA of any layout, and says what is wrong with one that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.config.lora_file import read_lora_file
from helpers.errors import ConfigError
from helpers.families.sdxl import SDXL
from helpers.protocols import Trainable
from tests.methods.conftest import ask
from tests.methods.test_adapters import DIFFUSERS, KOHYA, attached, moved

FILES = {"diffusers": DIFFUSERS, "kohya": KOHYA}


def written(family: SDXL, folder: Path, **chosen: Any) -> Trainable:
    method, trainable = attached(family, **chosen)
    method.save(moved(trainable), folder)
    return trainable


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize(
    "chosen",
    [{"lora_targets": ("to_q", "conv1")}, {"use_dora": True}, {"use_rslora": True, "lora_rank": 3}, {"lora_init_type": "pissa"}],
    ids=["some layers", "DoRA", "rank-stabilised", "PiSSA"],
)
def test_a_run_starts_where_a_lora_of_either_layout_ended(layout: str, chosen: dict[str, Any], family: SDXL, tmp_path: Path) -> None:
    """Which layers, rank, scale and magnitudes are the file's."""
    first = written(family, tmp_path, **chosen)
    path = tmp_path / FILES[layout]
    found = read_lora_file(path)
    settings = {name: getattr(found, name) for name in ("lora_rank", "lora_alpha", "use_dora", "use_rslora")}
    _, second = attached(family, init_lora=path, **settings)
    difference = (ask(family, second.denoiser) - ask(family, first.denoiser)).abs().max()
    assert difference < 5e-6
    if not first.fixed:
        assert all(torch.equal(weights, first.parameters[name]) for name, weights in second.parameters.items())


def test_layers_that_were_asked_for_must_be_those_of_the_file(family: SDXL, tmp_path: Path) -> None:
    written(family, tmp_path, lora_targets=("to_q", "to_k"))
    start = tmp_path / DIFFUSERS
    with pytest.raises(ConfigError, match=r"lacks .*to_v.lora_A.weight \(\d+ weights in all\), which --lora_targets"):
        attached(family, init_lora=start, lora_targets=("to_q", "to_k", "to_v"))
    with pytest.raises(ConfigError, match=r"has .*to_k.lora_A.weight \(\d+ weights in all\), which is not trained"):
        attached(family, init_lora=start, lora_targets=("to_q",))
    attached(family, init_lora=start, lora_targets=("to_q", "to_k"))


def test_another_model_than_the_files_is_named(family: SDXL, tmp_path: Path) -> None:
    written(family, tmp_path, lora_targets=("to_q",))
    matrices = {name.replace("mid_block", "middle"): tensor for name, tensor in load_file(tmp_path / DIFFUSERS).items()}
    save_file(matrices, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"layers that SDXL does not have, such as middle"):
        attached(family, init_lora=with_settings(tmp_path / "other.safetensors", tmp_path / DIFFUSERS))


def with_settings(path: Path, other: Path) -> Path:
    """The file with the header of another."""
    from safetensors import safe_open

    with safe_open(other, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata)
    return path


def test_a_file_that_is_no_lora_is_refused_before_anything_is_cached(family: SDXL, tmp_path: Path) -> None:
    save_file({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(2, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"cannot be read as a LoRA of SDXL; its weights have names such as lora_unet_double"):
        attached(family, init_lora=tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ConfigError, match=r"--init_lora: .*text.safetensors cannot be read as a LoRA of SDXL"):
        attached(family, init_lora=tmp_path / "text.safetensors")


def test_a_file_without_metadata_is_a_start_like_any_other(family: SDXL, tmp_path: Path) -> None:
    """As many published ones are."""
    written(family, tmp_path, lora_targets=("to_q",))
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / FILES["diffusers"]), bare)
    attached(family, init_lora=bare, lora_targets=("to_q",))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_tensor(value: float, family: SDXL, tmp_path: Path) -> None:
    written(family, tmp_path, lora_targets=("to_q",))
    path = tmp_path / DIFFUSERS
    spoilt = load_file(path)
    name = min(spoilt)
    spoilt[name][0, 0] = value
    save_file(spoilt, tmp_path / "spoilt.safetensors")
    with pytest.raises(ConfigError, match=r"spoilt.safetensors holds numbers that are not finite, in " + name):
        attached(family, init_lora=with_settings(tmp_path / "spoilt.safetensors", path))
