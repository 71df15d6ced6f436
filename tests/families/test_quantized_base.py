"""Every family's network with its blocks in fewer bits: nearly the same answers, gradients for an adapter, and the same LoRA files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import train
from helpers.config.options import AdapterOptions
from helpers.errors import ConfigError
from helpers.methods.lora import Lora
from helpers.methods.lycoris import Lycoris
from helpers.methods.quantized_base import QuantizedLinear, bytes_of, check_quantization, count_weights, quantize
from helpers.protocols import Trainable
from tests.families.conftest import CPU, Tried, open_family

# How far the answer of a miniature may be from that of its full weights, relative to its size; a weight alone is off by 0.4, 2.6 and 9 %.
TOLERANCES = {"int8": 0.02, "fp8": 0.12, "nf4": 0.3}
BITS = {"int8": 8, "fp8": 8, "nf4": 4.25}


def answer(tried: Tried, denoiser: Any) -> torch.Tensor:
    batch = tried.batch()
    timesteps = torch.tensor([10, 300, 700, 950])
    with torch.no_grad():
        return tried.family.predict(denoiser.eval(), batch.latents, timesteps, tried.family.conditioning(batch, CPU))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def adapter(tried: Tried, kind: str | None, **options: Any) -> tuple[Lora, Trainable]:
    """A LoRA, by default on attention, beside the network with its blocks in `kind`."""
    torch.manual_seed(7)
    method = Lora(dataclasses.replace(AdapterOptions(), lora_rank=4, lora_dropout=0.0, **options), tried.family)
    parts = tried.family.load(torch.float32)
    if kind:
        quantize(parts.denoiser, kind, CPU)
    torch.manual_seed(8)
    return method, method.attach(parts)


def test_the_answer_stays_within_the_tolerance_of_each_kind(tried: Tried) -> None:
    network = tried.family.load(torch.float32).denoiser
    expected, size = answer(tried, network), count_weights(network)
    assert size == sum(parameter.numel() for parameter in network.parameters())
    for kind, tolerance in TOLERANCES.items():
        rounded = tried.family.load(torch.float32).denoiser
        quantize(rounded, kind, CPU)
        found = answer(tried, rounded)
        assert 0 < off(found, expected) < tolerance, kind
        assert count_weights(rounded) == size


def test_linear_layers_of_blocks_are_rounded_and_the_first_and_last_are_not(tried: Tried) -> None:
    network = tried.family.load(torch.float32).denoiser
    before = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    quantize(network, "nf4", CPU)
    rounded = {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    assert rounded == {name for name in before if "block" in name.split(".")[0]}
    assert rounded < before


def test_an_adapter_learns_beside_it_and_nothing_else_moves(tried: Tried) -> None:
    _, trainable = adapter(tried, "nf4")
    frozen = {
        name: value.clone() for name, value in trainable.denoiser.state_dict().items() if torch.is_tensor(value) and "lora" not in name
    }
    objective, batch = tried.objective(), tried.batch()
    optimizer = torch.optim.AdamW(trainable.parameters.values(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = train.train_step(tried.family, objective, trainable.denoiser, batch, CPU)[0].mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in trainable.parameters.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = trainable.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "LoCon": {"lora_algorithm": "locon"},
    "PiSSA": {"lora_init_type": "pissa"},
    "LoKr": {"lora_algorithm": "lokr"},
    "LoHa": {"lora_algorithm": "loha"},
}


@pytest.mark.parametrize(("kind", "name"), [("int8", "LoRA"), ("fp8", "LoRA"), *(("nf4", name) for name in ADAPTERS)])
def test_an_adapter_of_any_kind_meets_the_rounded_weights_and_nothing_else(
    kind: str, name: str, miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """Answers and gradients are those of the same adapter beside a plain network that holds the rounded weights in full."""
    tried = Tried("sdxl", miniature("sdxl"), open_family("sdxl", miniature("sdxl"), tmp_path / "cache"))
    options = dataclasses.replace(AdapterOptions(), lora_rank=4, lora_dropout=0.0, **ADAPTERS[name])
    method = (Lycoris if name in ("LoKr", "LoHa") else Lora)(options, tried.family)
    found = []
    for full in (False, True):
        parts = tried.family.load(torch.float32)
        quantize(parts.denoiser, kind, CPU)
        if full:
            in_full(parts.denoiser)
        torch.manual_seed(8)
        trainable = method.attach(parts)
        for parameter in trainable.parameters.values():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        loss = train.train_step(tried.family, tried.objective(), trainable.denoiser, tried.batch(), CPU)[0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainable.parameters.values() if parameter.grad is not None])
        found.append((answer(tried, trainable.denoiser), gradient))
    (answers, gradients), (expected_answers, expected_gradients) = found
    assert expected_gradients.norm() > 0
    assert off(answers, expected_answers) < 1e-4
    assert off(gradients, expected_gradients) < 1e-3


def in_full(network: nn.Module) -> None:
    """Put plain layers that hold the same weights in the places of quantized ones."""
    for path, layer in [(path, module) for path, module in network.named_modules() if isinstance(module, QuantizedLinear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data.copy_(layer.weight)
        if layer.bias is not None:
            plain.bias.data.copy_(layer.bias)
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, plain)


def test_a_file_does_the_same_beside_the_weights_as_they_were(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """What it changes of the answer of the base model in full, and of the one in eight bits that it was trained beside."""
    tried = Tried("sdxl", miniature("sdxl"), open_family("sdxl", miniature("sdxl"), tmp_path / "cache"))
    method, trainable = adapter(tried, "int8", lora_alpha=4.0)
    began = answer(tried, trainable.denoiser)
    for parameter in trainable.parameters.values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    change = answer(tried, trainable.denoiser) - began
    method.save(trainable, tmp_path / "saved")
    plain = answer(tried, tried.family.load(torch.float32).denoiser)
    _, again = adapter(tried, None, lora_alpha=4.0, init_lora=tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    assert change.norm() > 0.1 * plain.norm()
    assert off(answer(tried, again.denoiser) - plain, change) < 0.05


@pytest.mark.parametrize("kind", TOLERANCES)
def test_it_weighs_what_its_bits_say(kind: str) -> None:
    layers = nn.ModuleDict({"blocks": nn.Linear(512, 256, bias=False)})
    quantize(layers, kind, CPU)
    rows = 0 if kind == "nf4" else 256 * 4  # a float32 scale for each
    assert bytes_of(layers) == 512 * 256 * BITS[kind] / 8 + rows


# What the 4 bits of nf4 stand for: QLoRA (Dettmers et al., 2023), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (24, 32), (40, 96), (7, 100), (5, 66), (3, 5), (1, 2)], ids=str)
def test_weights_of_any_width_in_nf4_are_their_nearest_numbers_times_the_largest_of_their_64(shape: tuple[int, int]) -> None:
    plain = nn.Linear(shape[1], shape[0])
    weights = plain.weight.detach().flatten()
    largest = torch.cat([part.abs().max().expand(len(part)) for part in weights.split(64)])
    nearest = (weights / largest - torch.tensor(NF4)[:, None]).abs().argmin(0)
    expected = torch.tensor(NF4)[nearest] * largest.half().float()  # as scales are kept
    assert torch.allclose(QuantizedLinear(plain, "nf4", CPU).weight.flatten(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", TOLERANCES)
def test_no_full_weights_are_kept_for_the_gradient(kind: str) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(64, 32)
    layer = QuantizedLinear(plain, kind, CPU)
    kept = []
    question = torch.randn(3, 64, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = layer(question)
    assert kept == []
    full = layer.weight
    assert off(full, plain.weight.detach()) < TOLERANCES[kind]
    assert torch.allclose(found, nn.functional.linear(question, full, plain.bias), atol=1e-6)
    [gradient] = torch.autograd.grad(found.sum(), question)
    assert torch.allclose(gradient, full.sum(0).expand(3, 64), atol=1e-5)


@pytest.mark.parametrize("kind", TOLERANCES)
def test_under_mixed_precision_it_answers_in_that_precision(kind: str) -> None:
    layer = QuantizedLinear(nn.Linear(64, 64).to(torch.bfloat16), kind, CPU)
    assert layer.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("weights", [torch.zeros(3, 5), torch.full((3, 5), 1e-9), torch.eye(3, 5) * 1e4], ids=["zeros", "tiny", "large"])
def test_no_weights_become_anything_but_numbers(kind: str, weights: torch.Tensor) -> None:
    """Also where a row has nothing in it, and where they do not fill a group."""
    plain = nn.Linear(5, 3)
    plain.weight.data.copy_(weights)
    assert torch.allclose(QuantizedLinear(plain, kind, CPU).weight, weights, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", [TypeError, ValueError, AssertionError])
def test_what_a_device_cannot_do_is_said_with_the_remedy(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise kind("no float8 on this device")

    monkeypatch.setattr("torch.Tensor.view", fails)
    with pytest.raises(ConfigError, match=r"--base_quantization=fp8 does not work on this cpu device \(no float8 on this device\); choose"):
        check_quantization("fp8", CPU, torch.float32)
