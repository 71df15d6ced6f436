"""AdamW for bfloat16 weights: arithmetic in float32, results rounded stochastically.

A bfloat16 number has 8 bits of mantissa, so an update below 1/512 of a weight is lost when rounded to nearest: 1 - 1000 x 0.001
stays 1. Rounded up with the probability of what would be cut off, it arrives on average (Zamirai et al., 2020). The moments are
bfloat16 too, rounded the same way, so a parameter takes 8 bytes with its gradient instead of 16.
No library is used because those that offer it round the second moment to nearest, where a decay of 0.999 does not move it, or
compile their step, which costs the bit-exactness of a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"].item())
        beta1, beta2 = group["betas"]
        gradient = parameter.grad.float()  # type: ignore[union-attr]  # checked by the caller
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weights = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1**step))
        round_stochastically(weights, parameter)
        round_stochastically(mean, state["exp_avg"])
        round_stochastically(square, state["exp_avg_sq"])


def round_stochastically(exact: Tensor, target: Tensor) -> None:
    """Write float32 `exact` into `target`: if that is bfloat16, up or down with the odds of the part that is cut off.

    A bfloat16 is the upper half of a float32, so a random number below 2^16 added to the bits carries into the upper half with
    just those odds. The odd non-finite value stays what it is.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    bits = (exact.view(torch.int32) + noise) & -65536
    target.copy_(torch.where(exact.isfinite(), bits.view(torch.float32), exact))
