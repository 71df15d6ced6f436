"""What accelerate compiles for training, as TRAINING_DYNAMO_BACKEND has it: the same step, of a network that stays what it was."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.training.test_engine import WEIGHTS, engine, losses, network


@pytest.mark.parametrize("backend", ["EAGER"])  # without code for the machine, which would take a minute
def test_a_compiled_network_takes_the_same_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for compiled in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        if compiled:
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        model = network()
        steps = engine(model)
        assert isinstance(steps.denoiser, torch._dynamo.OptimizedModule) is compiled
        steps.backward(losses(steps.denoiser, slice(0, 5)), WEIGHTS, 5)
        assert steps.step(seed=1, step=0, updates=0, global_samples=5).taken
        assert set(model.state_dict()) == set(network().state_dict())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.allclose(*weights, atol=1e-7)
