"""What one rank of a pair does for test_engine: a step whose samples are shared unevenly, then one whose loss is not finite on one rank.

Prints gradient norm, loss, learning rate and weights of the first step, and whether the second moved anything; then, for every
optimizer, a hash of the weights and the state that it has after three steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import nn

from helpers.config.optimizers import ADAMW_DEFAULTS, FINDS_RATE, IS_ADAMW, OPTIMIZERS
from helpers.config.options import OptimizerOptions
from helpers.protocols import Trainable
from helpers.training.engine import Engine
from helpers.training.runtime import Runtime
from helpers.training.schedules import Schedule
from helpers.training.stopping import StopRequest

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(4, generator=torch.Generator().manual_seed(1))
ROWS = [slice(0, 3), slice(3, 4)]  # of each rank


def state_after_steps(name: str, runtime: Runtime, mine: slice) -> str:
    torch.manual_seed(3)
    dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    trainable = Trainable(model, dict(model.named_parameters()), "toy", "toy")
    defaults = ADAMW_DEFAULTS if name in IS_ADAMW else {}
    options = dataclasses.replace(OptimizerOptions(), **{"optimizer": name, **defaults})
    engine = Engine(runtime, trainable, options, Schedule("constant", 1.0 if name in FINDS_RATE else 1e-2, 0.0, 0, 100))
    for step in range(3):
        losses = (engine.denoiser(INPUTS[mine].to(dtype)).squeeze(-1).float() - TARGETS[mine]) ** 2
        engine.backward(losses, torch.ones(len(losses)), 4)
        engine.step(seed=1, step=step, updates=step, global_samples=4)
    tensors, values = engine.state()
    weights = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
    content = save({"tensors/" + name: tensor.contiguous() for name, tensor in {**tensors, **weights}.items()})
    return hashlib.sha256(content + json.dumps(values).encode()).hexdigest()


def sums_in_float32(runtime: Runtime, mine: slice) -> dict[str, object]:
    """A step of bf16 weights whose samples come one by one, their gradients added up in float32."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.bfloat16)
    trainable = Trainable(model, dict(model.named_parameters()), "toy", "toy")
    options = dataclasses.replace(OptimizerOptions(), **{"optimizer": "adamw_bf16", **ADAMW_DEFAULTS})
    engine = Engine(runtime, trainable, options, Schedule("constant", 1e-2, 0.0, 0, 100), gradient_precision="fp32")
    places = range(4)[mine]
    for place in places:
        row = slice(place, place + 1)
        with engine.micro_batch(last=place == places[-1]):
            losses = (engine.denoiser(INPUTS[row].to(torch.bfloat16)).squeeze(-1).float() - TARGETS[row]) ** 2
            engine.backward(losses, torch.ones(1), 4)
    update = engine.step(seed=1, step=0, updates=0, global_samples=4)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
    return {"grad_norm": update.grad_norm, "weights": weights}


def listening() -> set[str]:
    """The addresses on which this process listens, as the kernel lists them."""
    own = {os.readlink(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{file}")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def meeting_of(runtime: Runtime) -> dict[str, object]:
    """What the processes told one another, and where this one listens since they met."""
    before = listening()
    meeting = runtime.meet()
    text = "x" * 10 ** (runtime.rank * 3)  # of another length on each
    told = [list(meeting.gather(f"{runtime.rank} ä")), runtime.gather({"rank": runtime.rank, "text": text, "none": None})]
    return {"told": told, "opened": sorted(listening() - before)}


def main() -> None:
    runtime = Runtime(Accelerator(cpu=True), StopRequest(), "no", [], [])
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    trainable = Trainable(model, dict(model.named_parameters()), "toy", "toy")
    options = dataclasses.replace(OptimizerOptions(), optimizer="adamw", max_grad_norm=0.05)
    engine = Engine(runtime, trainable, options, Schedule("linear", 1e-2, 0.0, 4, 100))
    rows = [slice(0, 4)] if runtime.world_size == 1 else ROWS
    mine = rows[runtime.rank]

    def step(number: int, factor: float) -> dict[str, object]:
        losses = (engine.denoiser(INPUTS[mine]).squeeze(-1) - TARGETS[mine]) ** 2 * factor
        engine.backward(losses, torch.ones(len(losses)), 4)
        update = engine.step(seed=1, step=number, updates=number, global_samples=4)
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
        result = {"taken": update.taken, "loss": update.loss, "grad_norm": update.grad_norm, "learning_rate": update.learning_rate}
        return {**result, "weights": weights}

    met = meeting_of(runtime)
    first = step(0, 1.0)
    second = step(1, float("nan") if runtime.rank == runtime.world_size - 1 else 1.0)
    states = {name: state_after_steps(name, runtime, mine) for name in OPTIMIZERS if name != "auto"}
    sums = sums_in_float32(runtime, mine)
    print(json.dumps({"met": met, "sums": sums, "first": first, "second": {**second, "loss": None, "grad_norm": None}, "states": states}))
    runtime.wait_for_everyone()
    runtime.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
