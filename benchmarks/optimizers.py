"""What optimizers cost: time of a step, and memory per weight.

    python -m benchmarks.optimizers                           the optimizers with a name of their own
    python -m benchmarks.optimizers came torch.optim:RAdam    some, by name or class

The tensors are like those of a medium-sized U-Net: many small ones (biases, norms), convolutions, matrices. Every optimizer gets the same
weights and gradients, in its training precision: bfloat16 for adamw_bf16, otherwise float32. Its time is compared with torch's AdamW
without fused kernels (`foreach=False`), alternating step by step. Memory is the size of the state after a step in bytes per weight,
without the weight and its gradient.

adamw_bf16 is also compared with its former update of one tensor after the other.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Figure, compared, conclude, in_turns, parser
from helpers.config.optimizers import ADAMW_DEFAULTS, FINDS_RATE, IS_ADAMW, OPTIMIZERS
from helpers.config.options import OptimizerOptions
from helpers.training import adamw_bf16
from helpers.training.optimizers import NamedOptimizer

BLOCK = [(320, 320, 3, 3), (320,), (320,), (640, 320), (640,), (320, 640), (320,), (128, 320), (320, 128), (8, 320), (320, 8)]
STEPS = 3  # steps per round


class Stepping:
    """An optimizer with a set of tensors and their gradients."""

    def __init__(self, name: str, blocks: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
        self.rate = 1.0 if name in FINDS_RATE else 1e-4
        self.parameters = {
            f"{block}.{number}": nn.Parameter(torch.randn(shape, device=device, dtype=self.dtype) / 10)
            for block in range(blocks)
            for number, shape in enumerate(BLOCK)
        }
        settings: dict[str, Any] = {"optimizer": name, **(ADAMW_DEFAULTS if name in IS_ADAMW else {})}
        options = dataclasses.replace(OptimizerOptions(), **settings)
        self.optimizer = NamedOptimizer(options, self.parameters, self.rate)
        self.gradients = [torch.randn_like(parameter) / 100 for parameter in self.parameters.values()]
        self.step()  # creates the state

    def step(self) -> None:
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient.clone()  # some optimizers change the gradient in place
        self.optimizer.step(self.rate)

    def milliseconds(self) -> float:
        """Milliseconds of a step, without preparing the gradients."""
        seconds = []
        for _ in range(STEPS):
            for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
                parameter.grad = gradient.clone()
            _wait_for_device()
            began = time.perf_counter()
            self.optimizer.step(self.rate)
            _wait_for_device()
            seconds.append(time.perf_counter() - began)
        return 1000 * statistics.median(seconds)

    @property
    def bytes_for_a_weight(self) -> float:
        tensors, _ = self.optimizer.state()
        held = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("/trained/"))
        return held / sum(parameter.numel() for parameter in self.parameters.values())


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def figures(names: Sequence[str], blocks: int, rounds: int, device: torch.device) -> Iterator[Figure]:
    usual = Stepping("adamw", blocks, device)
    for name in names:
        stepping = Stepping(name, blocks, device)
        yield compared(f"{name}: a step", "ms", in_turns(rounds, usual.milliseconds, stepping.milliseconds))
        yield Figure(f"{name}: state per weight", stepping.bytes_for_a_weight, "bytes")
        if name == "adamw_bf16":
            in_a_loop = in_turns(rounds, one_by_one(stepping), stepping.milliseconds)
            yield compared("adamw_bf16, compared with one tensor after the other", "ms", in_a_loop)


def one_by_one(stepping: Stepping) -> Callable[[], float]:
    """Milliseconds of a step that updates one tensor after the other."""

    def milliseconds() -> float:
        usual, elsewhere = dict(adamw_bf16.CHUNK), adamw_bf16.CHUNK_ELSEWHERE
        adamw_bf16.CHUNK, adamw_bf16.CHUNK_ELSEWHERE = {"cpu": 1}, 1
        try:
            return stepping.milliseconds()
        finally:
            adamw_bf16.CHUNK, adamw_bf16.CHUNK_ELSEWHERE = usual, elsewhere

    return milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", help="optimizers, by name or module:Class (default: those with a name of their own)")
    options.add_argument("--blocks", type=int, default=16, help="number of blocks of 1.4 M weights in 11 tensors (default 16)")
    chosen = options.parse_args(arguments)
    warnings.simplefilter("ignore")  # warnings of libraries about their own code
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    names = chosen.names or list(OPTIMIZERS)
    return conclude(list(figures(names, chosen.blocks, chosen.rounds, device or torch.device("cpu"))), chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
