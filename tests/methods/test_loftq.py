"""LoftQ: an adapter that begins with what a quantized base model lost, and whose file is for the base model that lost nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from helpers.config.options import CacheOptions, ModelOptions
from helpers.errors import ConfigError
from helpers.families.sdxl import SDXL
from helpers.methods.loftq import decompose
from helpers.methods.quantized_base import QuantizedLinear, quantize
from helpers.protocols import Parts, Reporter, Trainable
from tests.methods.conftest import QUESTION, ask
from tests.methods.test_adapters import DIFFUSERS, KOHYA, attached, method_of, moved, trained_on

CPU = torch.device("cpu")
KINDS = ("int8", "fp8", "nf4")
LOFTQ: dict[str, Any] = {"lora_init_type": "loftq"}
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


class Rounded(SDXL):
    """The miniature with its blocks quantized, as a run loads it."""

    kind = "nf4"

    def load(self, dtype: torch.dtype | None) -> Parts:
        parts = super().load(dtype)
        quantize(parts.denoiser, self.kind, CPU)
        return parts


@pytest.fixture
def rounded(model: Path, tmp_path: Path) -> Rounded:
    options = dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model))
    return Rounded(options, dataclasses.replace(CacheOptions(), cache_dir=tmp_path / "cache"))


def change(trainable: Trainable, layer: str, factor: float) -> torch.Tensor:
    """factor B A of a layer, (out, in)."""
    module = trainable.denoiser.get_submodule(layer)
    both: torch.Tensor = factor * module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
    return both


def layers_of(trainable: Trainable) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in trainable.parameters})


# -- where it begins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "scale"), [*((kind, {}) for kind in KINDS), ("nf4", {"use_rslora": True, "lora_rank": 3})], ids=str)
def test_every_layer_begins_nearer_to_its_weights_than_rounding_alone_comes(
    kind: str, scale: dict[str, Any], rounded: Rounded, family: SDXL
) -> None:
    rounded.kind = kind
    plain = rounded.load(torch.float32).denoiser
    full = dict(family.load(torch.float32).denoiser.named_parameters())
    method, trainable = attached(family, base=rounded, **LOFTQ, **scale)
    assert len(layers_of(trainable)) > 10
    for layer in layers_of(trainable):
        weight = full[f"{layer}.weight"]
        began = trainable.denoiser.get_submodule(layer).get_base_layer().weight + change(trainable, layer, method.factor)
        assert (weight - began).norm() < 0.9 * (weight - plain.get_submodule(layer).weight).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_alternating_comes_nearer_than_one_decomposition_of_what_was_lost(kind: str) -> None:
    """The latter by an exact SVD: the best that a start beside the weights as they were first rounded could be."""
    torch.manual_seed(0)
    plain = nn.Linear(96, 64, bias=False)
    layer, weight, usual = QuantizedLinear(plain, kind, CPU), plain.weight.detach(), torch.ones(8, 96)
    u, s, v = torch.linalg.svd(weight - layer.weight, full_matrices=False)
    once = (weight - layer.weight - (u[:, :8] * s[:8]) @ v[:8]).norm()
    a, b = decompose(layer, weight, usual, 2.0)
    assert (weight - layer.weight - 2 * b @ a).norm() < 0.97 * once


def test_it_is_the_alternation_of_the_paper() -> None:
    """Eight bits and exact decompositions in NumPy's double precision, against ours: the same changes but for what is drawn."""
    import numpy

    weight = numpy.random.default_rng(0).normal(0, 0.02, (32, 24))
    low = numpy.zeros_like(weight)
    for _ in range(5):
        left = weight - low
        scales = abs(left).max(1, keepdims=True) / 127
        kept = (left / scales).round() * scales
        u, s, v = numpy.linalg.svd(weight - kept, full_matrices=False)
        low = (u[:, :20] * s[:20]) @ v[:20]  # with 8 more directions than that, the randomised decomposition has them all
    layer = QuantizedLinear(nn.Linear(24, 32), "int8", CPU)
    a, b = decompose(layer, torch.tensor(weight, dtype=torch.float32), torch.ones(20, 24), 0.5)
    assert numpy.abs(layer.weight.numpy() - kept).max() < 1e-6
    assert numpy.abs(0.5 * (b @ a).numpy() - low).max() < 1e-6


@pytest.mark.parametrize("rank", [4, 40], ids=["a small rank", "more than the layer has"])
def test_directions_that_lost_nothing_begin_as_usual_and_learn(rank: int) -> None:
    """With A and B both 0 they would never move."""
    layer, usual = QuantizedLinear(nn.Linear(32, 16), "int8", CPU), torch.randn(rank, 32)
    exact = torch.randint(-127, 128, (16, 32)).float()
    exact[:, 0] = 127
    a, b = decompose(layer, exact, usual, 1.0)
    assert torch.equal(layer.weight, exact)
    assert torch.equal(a, usual) and not b.any()
    a, b = decompose(layer, torch.randn(16, 32), usual, 1.0)
    assert a.shape == (rank, 32) and b.shape == (16, rank) and a.any(1).all()
    assert torch.equal(a[16:], usual[16:]) and not b[:, 16:].any()


def test_it_begins_the_same_whatever_was_drawn_before_and_draws_nothing_itself(rounded: Rounded, family: SDXL) -> None:
    """As on every process of a run, and in every life of it: what the weights were rounded to is in no checkpoint."""
    found = []
    weight = family.load(torch.float32).denoiser.get_submodule(TO_Q).weight.detach()
    for seed in (1, 2):
        parts = rounded.load(torch.float32)
        layer = parts.denoiser.get_submodule(TO_Q)
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        a, b = decompose(layer, weight, torch.ones(4, 32), 1.0)
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append((layer.packed.clone(), layer.scales.clone(), a, b))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Shown(Reporter):
    """Keeps the progress of every bar."""

    def __init__(self) -> None:
        self.bars: dict[str, list[int]] = {}

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        done = self.bars.setdefault(f"{title}, {total} {unit}", [])
        yield done.append


@pytest.mark.parametrize("kind", ["loftq", "pissa"])
def test_how_far_a_long_start_has_come_is_shown(kind: str, rounded: Rounded, family: SDXL) -> None:
    shown = Shown()
    chosen: dict[str, Any] = {"lora_init_type": kind, "lora_dropout": 0.0, "lora_rank": 4}
    parts = (rounded if kind == "loftq" else family).load(torch.float32)
    parts.report = shown
    trainable = method_of(family, **chosen).attach(parts)
    count = len(layers_of(trainable))
    assert shown.bars == {f"{kind} initialization, {count} layers": [1] * count}


def test_layers_outside_the_blocks_begin_as_usual_and_one_inside_them_is_needed(rounded: Rounded, family: SDXL) -> None:
    _, trainable = attached(family, base=rounded, **LOFTQ, lora_targets=("conv_in", TO_Q))
    ups = {name: weights for name, weights in trainable.parameters.items() if ".lora_B." in name}
    assert {name.partition(".")[0]: bool(weights.any()) for name, weights in ups.items()} == {"conv_in": False, "mid_block": True}
    with pytest.raises(ConfigError, match="--lora_targets names none of those"):
        attached(family, base=rounded, **LOFTQ, lora_targets=("conv_in", "linear_1"))


def test_what_cannot_be_corrected_is_said_of_the_outline_too(family: SDXL) -> None:
    """Before hours of caching; an outline has no weights to round."""
    method, _ = attached(family)
    for targets, refused in ((("conv_in",), True), (("to_q", "conv_in"), False)):
        method.options = dataclasses.replace(method.options, **LOFTQ, lora_targets=targets)
        if refused:
            with pytest.raises(ConfigError, match="--lora_targets names none of those"):
                method.check(family.load(None))
        else:
            method.check(family.load(None))


# -- how it is kept, and what others make of it ------------------------------------------------------------------------------


def answer(unet: Any) -> torch.Tensor:
    added = {"text_embeds": QUESTION["pooled"], "time_ids": QUESTION["time_ids"]}
    with torch.no_grad():
        said: torch.Tensor = unet(QUESTION["noisy"], QUESTION["timesteps"], QUESTION["prompt_embeds"], added_cond_kwargs=added).sample
    return said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_its_file_does_beside_the_whole_base_model_what_was_trained_beside_the_rounded_one(
    kind: str, rounded: Rounded, family: SDXL, model: Path, tmp_path: Path
) -> None:
    """Nearer than a start at zero comes, and than the file would come without the second pair; in diffusers, by either layout.

    With an adapter on every layer: what the others lost nothing gives back.
    """
    rounded.kind = kind
    distances = {}
    for start in ("default", "loftq"):
        method, trainable = attached(family, base=rounded, lora_init_type=start, lora_algorithm="locon")
        method.export(moved(trainable, 0.01), tmp_path / start, {}, None)
        for name in (DIFFUSERS, KOHYA):
            pipeline = StableDiffusionXLPipeline.from_pretrained(model)
            pipeline.load_lora_weights(tmp_path / start, weight_name=name)
            distances[start, name] = float((answer(pipeline.unet) - ask(rounded, trainable.denoiser)).norm())
    for name, weights in pipeline.unet.named_parameters():
        if ".lora_B." in name:
            weights.data[:, method.options.lora_rank :] = 0
    without = float((answer(pipeline.unet) - ask(rounded, trainable.denoiser)).norm())
    assert distances["loftq", DIFFUSERS] == pytest.approx(distances["loftq", KOHYA], rel=1e-3)
    assert distances["loftq", DIFFUSERS] < 0.9 * distances["default", DIFFUSERS]
    assert distances["loftq", DIFFUSERS] < 0.9 * without


def test_a_fresh_one_hands_over_a_file_that_changes_nothing(rounded: Rounded, family: SDXL, tmp_path: Path) -> None:
    method, trainable = attached(family, base=rounded, **LOFTQ)
    method.save(trainable, tmp_path)
    _, again = attached(family, init_lora=tmp_path / DIFFUSERS, lora_rank=8, lora_alpha=8 * method.factor)
    assert (ask(family, again.denoiser) - ask(family, family.load(torch.float32).denoiser)).abs().max() < 5e-6


def test_it_is_kept_to_the_bit_and_goes_on_as_if_it_had_not_stopped(rounded: Rounded, family: SDXL, tmp_path: Path) -> None:
    """In the second life the average too, and what is taken away in files, are those of the first."""
    for name in ("at once", "twice"):
        (tmp_path / name).mkdir()
    at_once, _ = trained_on(family, LOFTQ, tmp_path / "at once", 0, 4, base=rounded)
    trained_on(family, LOFTQ, tmp_path / "twice", 0, 2, base=rounded)
    twice, _ = trained_on(family, LOFTQ, tmp_path / "twice", 2, 4, base=rounded)
    assert at_once.fixed and all(torch.equal(weights, twice.fixed[name]) for name, weights in at_once.fixed.items())
    assert torch.equal(ask(rounded, at_once.denoiser), ask(rounded, twice.denoiser))
    for path in (tmp_path / "at once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
