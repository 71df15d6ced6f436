"""Every family's network computes its activations twice where that is asked for: the same gradients, and far less kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import train
from helpers.config.options import AdapterOptions, RunOptions
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.protocols import Trainable
from helpers.training.memory import apply_memory_options
from tests.families.conftest import CPU, Tried

METHODS: tuple[Callable[..., Any], ...] = (FullFineTune, Lora)


def kept_and_gradients(tried: Tried, trainable: Trainable) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a forward pass keeps for the backward one beside weights, and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainable.denoiser.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)  # for dropout
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = train.train_step(tried.family, tried.objective(), trainable.denoiser, tried.batch(), CPU)[0].mean()
    held = sum(kept.values())
    loss.backward()  # type: ignore[no-untyped-call]
    return held, {name: parameter.grad.clone() for name, parameter in trainable.parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_and_less_is_kept(tried: Tried, method: Callable[..., Any]) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        trainable = method(AdapterOptions(), tried.family).attach(tried.family.load(torch.float32))
        for parameter in trainable.parameters.values():  # B of a new LoRA is zero, and A would have no gradient
            parameter.data += 0.01 * torch.randn(parameter.shape)
        apply_memory_options(trainable.denoiser, RunOptions(gradient_checkpointing=checkpointing), tried.family.facts.options)
        results.append(kept_and_gradients(tried, trainable))
    (plain, expected), (lean, found) = results
    assert expected.keys() == found.keys() == trainable.parameters.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name
    assert lean < 0.5 * plain
