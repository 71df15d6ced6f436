"""The LoRA that is handed over is the LoRA that was trained, wherever it is opened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.config.options import AdapterOptions
from helpers.errors import ConfigError
from helpers.families.sdxl import SDXL
from helpers.methods.lora import Lora
from helpers.protocols import Trainable
from tests.methods.conftest import ask

EVERYWHERE = (
    "to_k,to_q,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,time_emb_proj,conv,conv_in,conv_out,"
    "linear_1,linear_2"
)
Elsewhere = Callable[[str, torch.Tensor], str]


def trained(family: SDXL, **options: object) -> tuple[Lora, Trainable]:
    """An adapter with weights as training might leave them."""
    method = Lora(dataclasses.replace(AdapterOptions(), **{"lora_rank": 4, "lora_alpha": 8.0, **options}), family)
    trainable = method.attach(family.load(torch.float32))
    generator = torch.Generator().manual_seed(0)
    trainable.put({name: 0.05 * torch.randn(weights.shape, generator=generator) for name, weights in trainable.parameters.items()})
    return method, trainable


def test_a_fresh_adapter_changes_nothing(family: SDXL) -> None:
    frozen = family.load(torch.float32).denoiser.requires_grad_(False)  # torch picks other kernels for weights that can move
    untouched = ask(family, frozen)
    method = Lora(AdapterOptions(), family)
    assert torch.equal(ask(family, method.attach(family.load(torch.float32)).denoiser), untouched)


@pytest.mark.slow
def test_both_layouts_open_in_diffusers_and_predict_what_the_live_model_predicts(
    family: SDXL, model: Path, tmp_path: Path, elsewhere: Elsewhere
) -> None:
    """On every kind of layer, with an alpha that is not the rank. A LoRA that does nothing fails the same comparison."""
    method, trainable = trained(family, lora_targets=tuple(EVERYWHERE.split(",")))
    method.save(trainable, tmp_path / "out")
    said = elsewhere(
        f"""
        for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.kohya.safetensors", None):
            pipeline = StableDiffusionXLPipeline.from_pretrained({str(model)!r})
            if name:
                pipeline.load_lora_weights({str(tmp_path / "out")!r}, weight_name=name)
            print(difference(pipeline.unet))
        """,
        ask(family, trainable.denoiser),
    )
    diffusers_layout, kohya_layout, no_lora = map(float, said.split())
    assert diffusers_layout < 1e-5
    assert kohya_layout < 1e-5
    assert no_lora > 0.01


def test_the_kohya_layout_converts_back(family: SDXL, tmp_path: Path) -> None:
    """Names of the original SDXL code, the same matrices, alpha in every module, and no caption text anywhere."""
    method, trainable = trained(family)
    method.save(trainable, tmp_path)
    plain, kohya = load_file(tmp_path / "pytorch_lora_weights.safetensors"), load_file(tmp_path / "pytorch_lora_weights.kohya.safetensors")
    # Of a U-Net with one layer a block: down block 1, attention 0 is input block 3; the last up block with attention begins at 2.
    expected = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": "lora_unet_output_blocks_2_1_transformer_blocks_0_attn1_to_k",
    }
    for ours, theirs in expected.items():
        assert torch.equal(plain[f"{ours}.lora_A.weight"], kohya[f"{theirs}.lora_down.weight"])
        assert torch.equal(plain[f"{ours}.lora_B.weight"], kohya[f"{theirs}.lora_up.weight"])
        assert kohya[f"{theirs}.alpha"].item() == 8.0
    assert len(kohya) == len(plain) * 3 // 2
    with safe_open(tmp_path / "pytorch_lora_weights.kohya.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert not any("caption" in name or "tag" in name for name in metadata)


def test_rank_and_alpha_travel_with_the_file(family: SDXL, tmp_path: Path) -> None:
    method, trainable = trained(family)
    method.save(trainable, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 8.0)


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.kohya.safetensors"])
def test_merging_a_file_gives_the_weights_that_were_trained(file: str, family: SDXL, tmp_path: Path) -> None:
    """W + a / r B A with rank 64 and alpha 16: a reader that does not learn alpha, and takes it for the rank, merges four times as much."""
    method, trainable = trained(family, lora_rank=64, lora_alpha=16.0)
    method.save(trainable, tmp_path)
    path, layer = tmp_path / file, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = load_file(path)
    if "kohya" in file:
        name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
        a, b, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        factor = alpha.item() / len(a)
    else:
        a, b = tensors[f"unet.{layer}.lora_A.weight"], tensors[f"unet.{layer}.lora_B.weight"]
        with safe_open(path, "pt") as opened:
            metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        factor = metadata["unet.lora_alpha"] / metadata["unet.r"]
    adapted = trainable.denoiser.get_submodule(layer).eval()
    base = adapted.get_base_layer().weight
    with torch.no_grad():
        live = adapted(torch.eye(base.shape[1])).T  # a linear layer without bias answers with its matrix
    assert factor == 0.25
    assert torch.allclose(base + factor * b @ a, live, atol=1e-6)
    assert not torch.allclose(base + b @ a, live, atol=1e-2)


def test_small_steps_of_an_adapter_arrive_though_the_model_is_in_half_precision(family: SDXL) -> None:
    """0.02 - 1000 x 1e-6 is 0.019; of float16 or bfloat16, 0.02 would stay where it is."""
    trainable = Lora(dataclasses.replace(AdapterOptions(), lora_targets=(r"mid_block\..*attn1\.to_q",)), family).attach(
        family.load(torch.bfloat16)
    )
    trainable.put({name: torch.full_like(weights, 0.02) for name, weights in trainable.parameters.items()})
    optimizer = torch.optim.SGD(trainable.parameters.values(), lr=1e-6)
    for weights in trainable.parameters.values():
        weights.grad = torch.ones_like(weights)
    for _ in range(1000):
        optimizer.step()
    assert all(torch.allclose(weights, torch.tensor(0.019), atol=1e-6) for weights in trainable.parameters.values())


def test_what_was_saved_is_read_back_bit_for_bit(family: SDXL, tmp_path: Path) -> None:
    method, trainable = trained(family)
    method.save(trainable, tmp_path)
    stored = method.read(trainable, tmp_path)
    assert stored.keys() == trainable.parameters.keys()
    assert all(torch.equal(stored[name], weights) for name, weights in trainable.parameters.items())


def test_the_same_weights_give_the_same_bytes(family: SDXL, tmp_path: Path) -> None:
    method, trainable = trained(family)
    files = [method.save(trainable, tmp_path / str(number)) for number in range(4)]
    for same in zip(*files, strict=True):
        assert len({path.read_bytes() for path in same}) == 1


def test_adapter_weights_stay_float32_on_a_half_precision_model(family: SDXL) -> None:
    method = Lora(AdapterOptions(), family)
    assert method.weights_dtype("bf16", "adamw") == torch.bfloat16
    trainable = method.attach(family.load(torch.bfloat16))
    assert {weights.dtype for weights in trainable.parameters.values()} == {torch.float32}


def test_targets_can_be_a_regular_expression_and_must_fit(family: SDXL) -> None:
    only_mid = Lora(dataclasses.replace(AdapterOptions(), lora_targets=(r"mid_block\..*\.to_q",)), family)
    assert all("mid_block" in name for name in only_mid.attach(family.load(torch.float32)).parameters)
    nowhere = Lora(dataclasses.replace(AdapterOptions(), lora_targets=("to_nothing",)), family)
    with pytest.raises(ConfigError, match="to_nothing"):
        nowhere.attach(family.load(torch.float32))


def test_a_file_that_does_not_hold_what_was_trained_is_not_handed_over(family: SDXL, tmp_path: Path) -> None:
    """A LoRA that does nothing, one of another alpha, one that lacks a layer: each is found before the run says it is finished."""
    method, trainable = trained(family)
    [path, _] = method.save(trainable, tmp_path)
    tensors = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
    scales = {name.removesuffix(".lora_A.weight"): 2.0 for name in tensors if ".lora_A." in name}
    method._compare(path, tensors, scales)
    for wrong in ({name: 0 * tensor for name, tensor in tensors.items()}, dict(list(tensors.items())[2:])):
        with pytest.raises(RuntimeError, match="does not hold the trained"):
            method._compare(path, wrong, scales)
    with pytest.raises(RuntimeError, match=f"{len(scales)} layers differ"):
        method._compare(path, tensors, dict.fromkeys(scales, 1.0))


RULES = {r"attn2\.to_[kv]": {"rank": 6, "alpha": 3}, "attn2": {"lr_scale": 0.25}, "mid_block": {"rank": 2, "lr_scale": 3}}


@pytest.mark.parametrize("chosen", [{}, {"use_rslora": True}, {"lora_init_type": "pissa"}, {"use_dora": True}], ids=str)
def test_layers_have_the_rank_alpha_and_rate_of_the_first_rule_that_fits(chosen: dict[str, object], family: SDXL, tmp_path: Path) -> None:
    """In training, in a checkpoint and for a run that starts from the file; `save` itself reads back what diffusers makes of each."""
    rules = tmp_path / "layers.json"
    rules.write_text(json.dumps(RULES))
    options = {"lora_dropout": 0.0, "lora_rank": 4, "lora_alpha": 8.0, "lora_layers": rules, **chosen}
    method, trainable = trained(family, **options)
    kinds = {
        "attn2.to_k": (6, 3.0, 1.0),
        "attn2.to_v": (6, 3.0, 1.0),
        "attn2": (4, 8.0, 0.25),
        "mid_block": (2, 8.0, 3.0),
        "": (4, 8.0, 1.0),
    }
    for name, parameter in trainable.parameters.items():
        if "lora_A" not in name:
            continue
        rank, alpha, rate = next(expected for kind, expected in kinds.items() if kind in name)
        layer = trainable.denoiser.get_submodule(name.partition(".lora_A")[0])
        assert parameter.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / (rank**0.5 if chosen.get("use_rslora") else rank))
        assert trainable.lr_scales.get(name, 1.0) == rate
    path = method.save(trainable, tmp_path / "out")[0]
    stored = method.read(trainable, tmp_path / "out")
    assert all(torch.equal(stored[name], weights) for name, weights in trainable.parameters.items())
    again = {"init_lora": path, "lora_alpha": 5.0, "use_rslora": bool(chosen.get("use_rslora")), "use_dora": bool(chosen.get("use_dora"))}
    second = Lora(dataclasses.replace(AdapterOptions(), lora_dropout=0.0, **again), family).attach(family.load(torch.float32))
    assert (ask(family, second.denoiser) - ask(family, trainable.denoiser)).abs().max() < 5e-6


def test_a_rule_that_decides_about_no_layer_is_refused(family: SDXL, tmp_path: Path) -> None:
    rules = tmp_path / "layers.json"
    for content, reason in (
        ({"attn2": {"rank": 2}, "to_nothing": {"rank": 8}}, "'to_nothing' in .* fits no trained layer; trained layers are named like down"),
        ({"attn": {"rank": 2}, "attn2": {"rank": 8}}, "'attn2' in .* only fits layers for which an earlier expression counts"),
    ):
        rules.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=f"--lora_layers: {reason}"):
            trained(family, lora_layers=rules)
