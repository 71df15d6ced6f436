"""How a step of many micro-batches becomes one update of the weights, on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from helpers.protocols import Trainable
from helpers.training.gradients import Float32Gradients
from helpers.training.optimizers import NamedOptimizer
from helpers.training.runtime import Runtime
from helpers.training.schedules import Schedule

if TYPE_CHECKING:
    from helpers.config.options import OptimizerOptions


@dataclass(frozen=True)
class Update:
    """What one optimiser step did."""

    loss: float  # sum over the samples of the global step / their number; 0 where it has none
    samples: int  # that were there
    grad_norm: float  # of the whole gradient, before clipping
    learning_rate: float  # that the optimiser used: the schedule's, times the estimate where the optimiser makes one
    taken: bool  # False: the gradient was not finite, or there was no sample, and the weights stay as they were
    finite_loss: bool
    stop_asked: bool  # by any process, so that all of them stop at the same step


class Engine:
    """Backward, all-reduce, clip, finite check and optimiser step, over accelerate.

    The loss of a step is sum(weight x loss) over its samples divided by the samples of the *global* step, so a short
    micro-batch weighs what it holds. Samples that were planned and could not be had do not count. Accumulation is driven here: the
    gradients of all but the last micro-batch stay local.
    """

    def __init__(
        self,
        runtime: Runtime,
        trainable: Trainable,
        options: OptimizerOptions,
        schedule: Schedule,
        gradient_precision: str = "unmodified",
    ) -> None:
        self.runtime = runtime
        self.options = options
        self.schedule = schedule
        self.parameters: Mapping[str, nn.Parameter] = trainable.parameters
        self.accelerator = runtime.accelerator
        trainable.denoiser.to(runtime.device)
        self.optimizer = NamedOptimizer(options, trainable.parameters, schedule.rate)
        self.denoiser: nn.Module = self.accelerator.prepare_model(trainable.denoiser)
        in_fewer_bits = [parameter for parameter in self.parameters.values() if parameter.dtype != torch.float32]
        self._sums = Float32Gradients(self.parameters.values()) if gradient_precision == "fp32" and in_fewer_bits else None
        self._samples = 0
        self._loss = torch.zeros((), dtype=torch.float64, device="cpu" if runtime.device.type == "mps" else runtime.device)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and the backward pass of one; `last` marks the step's last on this process.

        Processes share gradients in the backward pass of the last one, and DDP wants to know of it before the forward pass.
        """
        shared = last and self._sums is None  # sums in float32 are shared when they are complete
        with contextlib.nullcontext() if shared else self.accelerator.no_sync(self.denoiser):
            yield

    def backward(self, losses: Tensor, weights: Tensor, global_samples: int, samples: int | None = None) -> None:
        """Add a micro-batch's gradient. losses, weights (B,).

        `samples` is their number where it is not B: 0 for a stand-in, whose weight is 0. DDP takes the mean over processes, so the
        world size is multiplied in here.
        """
        total = (losses * weights).sum()
        self._samples += len(losses) if samples is None else samples
        self._loss += total.detach().double().to(self._loss.device)
        scaled = total * (self.runtime.world_size / global_samples)
        self.accelerator.backward(scaled)
        if self._sums is not None:
            self._sums.take()

    def step(self, seed: int, step: int, updates: int, global_samples: int) -> Update:
        """Apply the accumulated gradient of a step of `global_samples` planned samples.

        `updates` counts the optimiser steps taken so far: the schedule's clock.
        """
        if self._sums is not None:
            self._sums.give(self.runtime.world_size)
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer.over_gradients)
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        finite = bool(torch.isfinite(grad_norm))
        told = (self._loss.item(), float(self._samples), float(not finite), float(self.runtime.stop.asked))
        loss_sum, samples, bad, stop = self.runtime.sum(*told)
        if 0 < samples < global_samples:
            torch._foreach_mul_(grads, global_samples / samples)
            grad_norm = grad_norm * (global_samples / samples)
        limit = self.options.max_grad_norm
        nn.utils.clip_grads_with_norm_(self.parameters.values(), limit if limit > 0 else float("inf"), grad_norm)
        learning_rate = self.optimizer.effective(self.schedule(updates))
        finite_loss = bool(torch.isfinite(torch.tensor(loss_sum)))
        taken = not bad and finite_loss and samples > 0
        if taken:
            self.runtime.seed("rounding", seed, step)  # the same on every process: each updates its own copy of the weights
            self.optimizer.step(self.schedule(updates))
        if scaler is not None:
            scaler.update()  # halves the scale where `unscale_` met an overflow
        self.optimizer.zero_grad()
        self._loss.zero_()
        self._samples = 0
        return Update(loss_sum / max(samples, 1), int(samples), float(grad_norm), learning_rate, taken, finite_loss, bool(stop))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimiser tensors by name, and the numbers beside them, for a checkpoint."""
        tensors, numbers = self.optimizer.state()
        scaler = self.accelerator.scaler
        return tensors, {"optimizer": numbers, "scaler": scaler.state_dict() if scaler is not None else None}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.optimizer.restore(tensors, numbers["optimizer"])
        if self.accelerator.scaler is not None and numbers["scaler"]:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
