"""What optimisers cost: time of a step, and memory for a weight.

    python -m benchmarks.optimizers              those with a name of their own
    python -m benchmarks.optimizers soap came    others, by their names

The tensors are those of a middle-sized U-Net in kind: many small ones (biases, norms), convolutions, matrices. Every optimiser is given
the same weights and gradients, in the precision it trains in: bfloat16 for adamw_bf16, else float32. Its time is compared with torch's
AdamW as it runs without fused kernels (`foreach=False`), step by step in turns. Memory is what the state holds after a step, in bytes
for a weight, beside the weight itself and its gradient.

adamw_bf16 is measured once more beside an update of one tensor after the other, which it was before.
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
from helpers.config.optimizers import ADAM_DEFAULTS, ADAM_FORMS, ADAPTIVE_RATE, OPTIMIZERS
from helpers.config.options import OptimizerOptions
from helpers.training import adamw_bf16
from helpers.training.optimizers import NamedOptimizer

BLOCK = [(320, 320, 3, 3), (320,), (320,), (640, 320), (640,), (320, 640), (320,), (128, 320), (320, 128), (8, 320), (320, 8)]
STEPS = 3  # in a round


class Stepping:
    """An optimiser over a set of tensors with gradients."""

    def __init__(self, name: str, blocks: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
        self.rate = 1.0 if name in ADAPTIVE_RATE else 1e-4
        self.parameters = {
            f"{block}.{number}": nn.Parameter(torch.randn(shape, device=device, dtype=self.dtype) / 10)
            for block in range(blocks)
            for number, shape in enumerate(BLOCK)
        }
        settings: dict[str, Any] = {"optimizer": name, **(ADAM_DEFAULTS if name in ADAM_FORMS else {})}
        options = dataclasses.replace(OptimizerOptions(), **settings)
        self.optimizer = NamedOptimizer(options, self.parameters, self.rate)
        self.gradients = [torch.randn_like(parameter) / 100 for parameter in self.parameters.values()]
        self.step()  # which makes the state

    def step(self) -> None:
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient.clone()  # some optimisers work in it
        self.optimizer.step(self.rate)

    def milliseconds(self) -> float:
        """Of a step, without what it takes to lay the gradients out."""
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
        yield Figure(f"{name}: state of a weight", stepping.bytes_for_a_weight, "bytes")
        if name == "adamw_bf16":
            in_a_loop = in_turns(rounds, one_by_one(stepping), stepping.milliseconds)
            yield compared("adamw_bf16 beside one tensor after the other", "ms", in_a_loop)


def one_by_one(stepping: Stepping) -> Callable[[], float]:
    """The milliseconds of a step whose chunks hold one tensor."""

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
    options.add_argument("names", nargs="*", help="optimisers; by default those with a name of their own")
    options.add_argument("--blocks", type=int, default=16, help="of 1.4 M weights in 11 tensors each (default 16)")
    chosen = options.parse_args(arguments)
    warnings.simplefilter("ignore")  # of libraries, about their own code
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    names = chosen.names or [name for name in OPTIMIZERS if name != "auto"]
    return conclude(list(figures(names, chosen.blocks, chosen.rounds, device or torch.device("cpu"))), chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
