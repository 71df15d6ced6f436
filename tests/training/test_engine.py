"""A step cut into any micro-batches is the step of one undivided batch."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from helpers.config.optimizers import ADAMW_DEFAULTS
from helpers.config.options import OptimizerOptions
from helpers.protocols import Trainable
from helpers.training.engine import Engine
from helpers.training.runtime import Runtime
from helpers.training.schedules import Schedule
from helpers.training.stopping import StopRequest
from tests.warm import Program

ROOT = Path(__file__).resolve().parents[2]
INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(5, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.tensor([1.0, 1.0, 0.5, 1.0, 2.0])
CONSTANT = Schedule("constant", 1e-2, 0.0, 0, 100)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def engine(model: nn.Module, gradient_precision: str = "unmodified", **options: object) -> Engine:
    runtime = Runtime(Accelerator(mixed_precision="no"), StopRequest(), "no", [], [])
    trainable = Trainable(model, dict(model.named_parameters()), "toy", "toy")
    return Engine(
        runtime, trainable, dataclasses.replace(OptimizerOptions(), **{"optimizer": "adamw", **options}), CONSTANT, gradient_precision
    )


def losses(model: nn.Module, rows: slice) -> torch.Tensor:
    return (model(INPUTS[rows]).squeeze(-1) - TARGETS[rows]) ** 2


def undivided(clip: float) -> tuple[float, float, list[torch.Tensor]]:
    """The same step by hand: weighted losses over the number of samples, clipped, one step of torch's AdamW."""
    model = network()
    loss = (losses(model, slice(0, 5)) * WEIGHTS).sum() / 5
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2).step()
    return loss.item(), norm.item(), [parameter.detach() for parameter in model.parameters()]


def test_planned_samples_that_are_not_there_do_not_count() -> None:
    """Seven places, of which two are empty and one micro-batch is a stand-in of weight 0: the step of the five that are there."""
    expected_loss, expected_norm, expected = undivided(0.05)
    model = network()
    steps = engine(model, max_grad_norm=0.05)
    steps.backward(losses(steps.denoiser, slice(0, 3)), WEIGHTS[:3], 7, samples=3)
    steps.backward(losses(steps.denoiser, slice(0, 1)), torch.zeros(1), 7, samples=0)
    steps.backward(losses(steps.denoiser, slice(3, 5)), WEIGHTS[3:], 7, samples=2)
    update = steps.step(seed=1, step=0, updates=0, global_samples=7)
    assert (update.taken, update.samples) == (True, 5)
    assert update.loss == pytest.approx(expected_loss, rel=1e-6)
    assert update.grad_norm == pytest.approx(expected_norm, rel=1e-5)
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_without_samples_changes_nothing() -> None:
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps = engine(model)
    steps.backward(losses(steps.denoiser, slice(0, 1)), torch.zeros(1), 2, samples=0)
    update = steps.step(seed=1, step=0, updates=0, global_samples=2)
    assert (update.taken, update.samples, update.loss) == (False, 0, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("cuts", [[(0, 5)], [(0, 3), (3, 5)], [(0, 4), (4, 5)], [(0, 1), (1, 2), (2, 5)]])
def test_short_micro_batches_weigh_what_they_hold(cuts: list[tuple[int, int]]) -> None:
    expected_loss, expected_norm, expected = undivided(0.05)
    model = network()
    steps = engine(model, max_grad_norm=0.05)
    for start, end in cuts:
        rows = slice(start, end)
        steps.backward(losses(steps.denoiser, rows), WEIGHTS[rows], 5)
    update = steps.step(seed=1, step=0, updates=0, global_samples=5)
    assert update.taken
    assert update.loss == pytest.approx(expected_loss, rel=1e-6)
    assert update.grad_norm == pytest.approx(expected_norm, rel=1e-5)
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def step_of(*micro_batches: tuple[list[float], float]) -> float:
    """The loss of a step of micro-batches: the losses of their samples, and the weight that all of these have."""
    model, samples = network(), sum(len(values) for values, _ in micro_batches)
    steps = engine(model)
    for number, (values, weight) in enumerate(micro_batches):
        with steps.micro_batch(last=number == len(micro_batches) - 1):
            zero = losses(steps.denoiser, slice(0, 1)) * 0  # so that there is a gradient
            steps.backward(zero + torch.tensor(values), torch.full((len(values),), weight), samples)
    return steps.step(seed=1, step=0, updates=0, global_samples=samples).loss


def test_the_loss_of_a_step_is_the_mean_of_its_samples_and_not_of_its_micro_batches() -> None:
    """Four of loss 1 and one of loss 5 are 9 / 5; the mean of the two means would be 3."""
    assert step_of(([1.0] * 4, 1.0), ([5.0], 1.0)) == pytest.approx(1.8, rel=1e-6)


def test_regularization_images_count_by_their_weight_in_any_split_into_micro_batches() -> None:
    """As many of the subject as of its class: twice the loss of the step is L_subject + w L_class."""
    subject, prior, weight = [1.0, 2.0], [4.0, 8.0], 0.25
    expected = 1.5 + weight * 6.0
    assert 2 * step_of((subject, 1.0), (prior, weight)) == pytest.approx(expected, rel=1e-6)
    assert 2 * step_of((subject, 1.0), (prior[:1], weight), (prior[1:], weight)) == pytest.approx(expected, rel=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing_and_leaves_nothing_behind() -> None:
    model = network()
    steps = engine(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps.backward(losses(steps.denoiser, slice(0, 2)) * float("inf"), WEIGHTS[:2], 2)
    update = steps.step(seed=1, step=0, updates=0, global_samples=2)
    assert not update.taken and not math.isfinite(update.loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), before, strict=True))
    steps.backward(losses(steps.denoiser, slice(0, 2)), WEIGHTS[:2], 2)
    assert steps.step(seed=1, step=1, updates=0, global_samples=2).taken


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_the_optimizer_is_restored_bit_for_bit(optimizer: str) -> None:
    """Two steps in one life, or one step, a save, a restore and one step: the same weights."""

    def steps(engine: Engine, start: int, count: int) -> None:
        for step in range(start, start + count):
            engine.backward(losses(engine.denoiser, slice(0, 5)).float(), WEIGHTS, 5)
            engine.step(seed=1, step=step, updates=step, global_samples=5)

    def build() -> tuple[nn.Module, Engine]:
        model = network().to(torch.bfloat16 if optimizer == "adamw_bf16" else torch.float32)
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(next(module.parameters()).dtype),))
        return model, engine(model, optimizer=optimizer, **(ADAMW_DEFAULTS if optimizer == "adamw_bf16" else {}))

    undisturbed, whole = build()
    steps(whole, 0, 3)
    stopped, first = build()
    steps(first, 0, 2)
    tensors, numbers = first.state()
    resumed, second = build()
    resumed.load_state_dict(stopped.state_dict())
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    steps(second, 2, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.parameters(), undisturbed.parameters(), strict=True))


@pytest.mark.parametrize("kept_in", ["unmodified", "fp32"])
def test_the_gradients_of_many_micro_batches_add_up_in_float32_where_that_is_asked_for(kept_in: str) -> None:
    """Of one weight: 1 and 300 times 0.002, of which a sum in bfloat16 keeps nothing, since its next number after 1 is 1.0078."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    steps = engine(model, gradient_precision=kept_in, optimizer="adamw_bf16", max_grad_norm=0.0, **ADAMW_DEFAULTS)
    for value in (1.0, *[0.002] * 300):
        inputs = torch.tensor([[value]], dtype=torch.bfloat16)
        steps.backward(steps.denoiser(inputs).squeeze(-1).float(), torch.ones(1), 1)
    found = steps.step(seed=1, step=0, updates=0, global_samples=1).grad_norm
    assert found == pytest.approx(1.6 if kept_in == "fp32" else 1.0, rel=1e-2)


def test_a_loss_scaler_finds_the_gradients_of_an_offloaded_optimizer() -> None:
    model = network()
    steps = engine(model, optimizer_cpu_offload=True, max_grad_norm=0.0)
    steps.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # accelerate has one for fp16 on a GPU alone
    expected = network()
    losses(expected, slice(0, 5)).mean().backward()
    steps.accelerator.scaler.scale(losses(steps.denoiser, slice(0, 5)).mean()).backward()
    steps._samples = 5
    update = steps.step(seed=1, step=0, updates=0, global_samples=5)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in expected.parameters() if parameter.grad is not None])
    assert update.taken
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def on_processes(count: int) -> list[dict[str, Any]]:
    """What each of `count` real processes printed of tests/training/two_processes.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(count):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        environ = {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environ |= {name: str(value) for name, value in group.items()} if count > 1 else {}
        ranks.append(Program(["-m", "tests.training.two_processes"], ROOT, environ))
    return [json.loads(next(line for line in rank.communicate(120)[0].splitlines() if line.startswith("{"))) for rank in ranks]


@pytest.mark.slow
def test_two_processes_with_uneven_shares_take_the_step_of_one_and_agree_on_what_is_not_finite() -> None:
    """3 samples here and 1 there: a plain mean over processes would be 15 % off. A NaN on one rank is a skipped step on both."""
    [alone], pair = on_processes(1), on_processes(2)
    assert pair[0]["states"] == pair[1]["states"]  # of every optimizer, to the bit
    assert pair[0]["sums"] == pair[1]["sums"]
    assert pair[0]["sums"]["grad_norm"] == pytest.approx(alone["sums"]["grad_norm"], rel=1e-2)  # bf16 holds three digits
    assert pair[0]["states"].keys() == alone["states"].keys()
    for rank in pair:
        assert rank["met"]["opened"] == []  # on one machine nobody else can join in
        texts, values = rank["met"]["told"]
        assert texts == ["0 ä", "1 ä"] and [value["rank"] for value in values] == [0, 1]
        assert [len(value["text"]) for value in values] == [1, 1000]
        assert rank["first"]["loss"] == pytest.approx(alone["first"]["loss"], rel=1e-6)
        assert rank["first"]["grad_norm"] == pytest.approx(alone["first"]["grad_norm"], rel=1e-6)
        assert rank["first"]["weights"] == pytest.approx(alone["first"]["weights"], abs=1e-7)
        assert rank["first"]["learning_rate"] == alone["first"]["learning_rate"] == 2.5e-3  # the first of four steps of warm-up
        assert rank["second"]["taken"] is False
        assert rank["second"]["weights"] == rank["first"]["weights"]
