"""AdamW for bfloat16 weights: arithmetic in float32, results rounded stochastically.

A bfloat16 number has 8 bits of mantissa, so an update below 1/512 of a weight is lost when rounded to nearest: 1 - 1000 x 0.001
stays 1. Rounded up with the probability of what would be cut off, it arrives on average (Zamirai et al., 2020). The moments are
bfloat16 too, rounded the same way, so a parameter takes 8 bytes with its gradient instead of 16.
No library is used because those that offer it round the second moment to nearest, where a decay of 0.999 does not move it, or
compile their step, which costs the bit-exactness of a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Weights are updated by so many at a time: one kernel for all of them, and about 40 bytes each of float32 in between. A CPU is
# faster while they fit into its cache. A larger tensor goes alone.
CHUNK = {"cpu": 1 << 16}
CHUNK_ELSEWHERE = 1 << 22


class AdamWBF16(Optimizer):
    """Loshchilov and Hutter (2019), algorithm 2, with bias correction and decoupled weight decay.

    Draws rounding bits from torch's global generator of the device: seed it before a step for a reproducible one.
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
        """Parameters with a gradient, together where step, device and precision are the same; their steps count on."""
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
        """All of them laid end to end, so that every operation is one kernel."""
        beta1, beta2 = group["betas"]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        gradient = _end_to_end([parameter.grad for parameter in parameters if parameter.grad is not None])
        mean = _end_to_end(means).lerp_(gradient, 1 - beta1)
        square = _end_to_end(squares).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weights = _end_to_end(parameters).mul_(1 - group["lr"] * group["weight_decay"])
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


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """A float32 copy of tensors as one vector."""
    vector = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.float32, device=tensors[0].device)
    torch._foreach_copy_(_cut(vector, tensors), list(tensors))
    return vector


def _cut(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector as views in the shapes of tensors that were laid end to end."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _noises(lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Rounding bits for weights, means and squares of tensors of these lengths, laid end to end.

    Each tensor's are drawn one after the other, so that on a CPU they do not depend on the chunk they are in.
    """
    drawn = torch.randint(0, 1 << 16, (3 * sum(lengths),), dtype=torch.int32, device=device)
    pieces = drawn.split([length for length in lengths for _ in range(3)])
    return [torch.cat(pieces[which::3]) for which in range(3)]


def rounded_stochastically(exact: Tensor, noise: Tensor) -> Tensor:
    """float32 `exact` as float32 that a bfloat16 can hold, up or down with the odds of the part that is cut off.

    A bfloat16 is the upper half of a float32, so a random number below 2^16 (`noise`, int32) added to the bits carries into the
    upper half with just those odds. The odd non-finite value stays what it is.
    """
    bits = (noise + exact.view(torch.int32)).bitwise_and_(-65536)
    return torch.where(exact.isfinite(), bits.view(torch.float32), exact)
