"""AdamW for bfloat16 weights: arithmetic in float32, results rounded stochastically.

A bfloat16 number has 8 bits of mantissa, so round-to-nearest loses any update below 1/512 of a weight: 1 - 1000 x 0.001 stays 1.
Stochastic rounding rounds up with a probability equal to the part that is cut off, so updates are right on average (Zamirai et al.,
2020). The moments are bfloat16 too and rounded the same way: 8 bytes per parameter including the gradient, instead of 16.

Why no library: those we tried round the second moment to nearest, where a decay of 0.999 has no effect, or compile their step,
which breaks bit-exact resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Number of weights updated by one kernel; each needs about 40 bytes of float32 meanwhile. A CPU is faster while they fit into its
# cache. A larger tensor is updated on its own.
CHUNK = {"cpu": 1 << 16}
CHUNK_ELSEWHERE = 1 << 22


class AdamWBF16(Optimizer):
    """Loshchilov and Hutter (2019), algorithm 2, with bias correction and decoupled weight decay.

    Rounding bits come from torch's global generator of the device: seed it before each step to get reproducible results.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        for group in self.param_groups:
            for step, parameters in self._counted(group):
                for chunk in _chunks(parameters):
                    self._update(chunk, step, group)

    def _counted(self, group: dict[str, Any]) -> Iterator[tuple[int, list[Tensor]]]:
        """Parameters with a gradient, grouped by step, device and precision; increments their step counters."""
        alike: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            alike.setdefault((int(state["step"].item()), parameter.device, parameter.dtype), []).append(parameter)
        yield from ((step, parameters) for (step, _, _), parameters in alike.items())

    def _update(self, parameters: Sequence[Tensor], step: int, group: dict[str, Any]) -> None:
        """Update these parameters, concatenated, so that every operation is one kernel."""
        beta1, beta2 = group["betas"]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        gradient = _concatenated([parameter.grad for parameter in parameters if parameter.grad is not None])
        mean = _concatenated(means).lerp_(gradient, 1 - beta1)
        square = _concatenated(squares).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weights = _concatenated(parameters).mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1**step))
        results = [weights, mean, square]
        if parameters[0].dtype == torch.bfloat16:
            noises = _noises([parameter.numel() for parameter in parameters], weights.device)
            results = [rounded_stochastically(exact, noise) for exact, noise in zip(results, noises, strict=True)]
        for values, targets in zip(results, (parameters, means, squares), strict=True):
            torch._foreach_copy_(list(targets), _cut(values, targets))


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    limit = CHUNK.get(parameters[0].device.type, CHUNK_ELSEWHERE)
    chunk: list[Tensor] = []
    held = 0
    for parameter in parameters:
        if chunk and held + parameter.numel() > limit:
            yield chunk
            chunk, held = [], 0
        chunk.append(parameter)
        held += parameter.numel()
    yield chunk


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """A float32 copy of the tensors as one vector."""
    vector = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.float32, device=tensors[0].device)
    torch._foreach_copy_(_cut(vector, tensors), list(tensors))
    return vector


def _cut(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_concatenated`: views into the vector in the shapes of `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _noises(lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Rounding bits for weights, means and squares of concatenated tensors of these lengths.

    Drawn tensor by tensor, so that on a CPU they do not depend on how tensors are grouped into chunks.
    """
    drawn = torch.randint(0, 1 << 16, (3 * sum(lengths),), dtype=torch.int32, device=device)
    pieces = drawn.split([length for length in lengths for _ in range(3)])
    return [torch.cat(pieces[which::3]) for which in range(3)]


def rounded_stochastically(exact: Tensor, noise: Tensor) -> Tensor:
    """Round float32 `exact` to values that bfloat16 can hold, up or down at random, so that the mean is exact. => float32

    A bfloat16 is the upper half of a float32. Adding a random number below 2^16 (`noise`, int32) to the bits carries into the upper
    half with a probability equal to the part that is cut off. Non-finite values stay as they are.
    """
    bits = (noise + exact.view(torch.int32)).bitwise_and_(-65536)
    return torch.where(exact.isfinite(), bits.view(torch.float32), exact)
