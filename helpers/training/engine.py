"""How a step of many micro-batches becomes one update of the weights, on any number of processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
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

OF_TEXT = "/text/"  # before the names of the text encoders' optimiser's tensors in checkpoints


@dataclass(frozen=True)
class Update:
    """What one optimiser step did."""

    loss: float  # sum over the samples of the global step / their number; 0 where it has none
    samples: int  # that were there
    grad_norm: float  # of the whole gradient, before clipping
    learning_rate: float  # that the optimiser used: the schedule's, times the estimate where the optimiser makes one
    taken: bool  # False: gradient or loss was not finite, or there was no sample, and the weights stay as they were
    stop_asked: bool  # by any process, so that all of them stop at the same step
    text_learning_rate: float | None  # the same of the text encoders: 0 once they stand still, None where none is trained


class Engine:
    """Backward, all-reduce, clip, finite check and optimiser step, over accelerate.

    The loss of a step is sum(weight x loss) over its samples divided by the samples of the *global* step, so a short
    micro-batch weighs what it holds. Samples that were planned and could not be had do not count. Accumulation is driven here: the
    gradients of all but the last micro-batch stay local.

    Text encoders that are trained have an optimiser of their own: its rate is the schedule's times `text_rate`, and from step
    `text_stop` on, counted from 0, it takes no more steps. The gradient is clipped as one over all networks.
    """

    def __init__(
        self,
        runtime: Runtime,
        trainable: Trainable,
        options: OptimizerOptions,
        schedule: Schedule,
        gradient_precision: str = "unmodified",
        text_rate: float = 1.0,
        text_stop: int = 0,
    ) -> None:
        self.runtime = runtime
        self.options = options
        self.schedule = schedule
        self.parameters: Mapping[str, nn.Parameter] = trainable.parameters
        self.accelerator = runtime.accelerator
        self.text_rate, self.text_stop = text_rate, text_stop
        for module in trainable.modules.values():
            module.to(runtime.device)
        roles = tuple(f"{role}." for role in trainable.text_encoders)
        text = {name: parameter for name, parameter in trainable.parameters.items() if name.startswith(roles)}
        denoiser = {name: parameter for name, parameter in trainable.parameters.items() if name not in text}
        self.optimizer = NamedOptimizer(options, denoiser, schedule.rate)
        self.text_optimizer = NamedOptimizer(options, text, schedule.rate * text_rate) if text else None
        self.denoiser: nn.Module = self.accelerator.prepare_model(trainable.denoiser)
        self.text_encoders: dict[str, nn.Module] = {
            role: self.accelerator.prepare_model(module) for role, module in trainable.text_encoders.items()
        }
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
        with contextlib.ExitStack() as local:
            for module in () if shared else (self.denoiser, *self.text_encoders.values()):
                local.enter_context(self.accelerator.no_sync(module))
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
        moving = [self.optimizer, *([self.text_optimizer] if self.text_optimizer and step < self.text_stop else [])]
        self._complete_gradients(moving)
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
        rates = {optimizer: self.schedule(updates) * (self.text_rate if optimizer is self.text_optimizer else 1.0) for optimizer in moving}
        used = {optimizer: optimizer.effective(rate) for optimizer, rate in rates.items()}
        taken = not bad and math.isfinite(loss_sum) and samples > 0
        if taken:
            self.runtime.seed("rounding", seed, step)  # the same on every process: each updates its own copy of the weights
            for optimizer, rate in rates.items():
                optimizer.step(rate)
        self._begin_anew(moving)
        return Update(
            loss=loss_sum / max(samples, 1),
            samples=int(samples),
            grad_norm=float(grad_norm),
            learning_rate=used[self.optimizer],
            taken=taken,
            stop_asked=bool(stop),
            text_learning_rate=used.get(self.text_optimizer, 0.0) if self.text_optimizer else None,
        )

    def _complete_gradients(self, moving: Sequence[NamedOptimizer]) -> None:
        """Leave them as they are to be used: summed, and without the factor that keeps those of fp16 above zero."""
        if self._sums is not None:
            self._sums.give(self.runtime.world_size)
        if self.accelerator.scaler is not None:
            for optimizer in moving:
                self.accelerator.scaler.unscale_(optimizer.over_gradients)

    def _begin_anew(self, moving: Sequence[NamedOptimizer]) -> None:
        """Leave nothing of this step to the next."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # halves the scale where `unscale_` met an overflow
        for optimizer in moving:
            optimizer.zero_grad()
        self._loss.zero_()
        self._samples = 0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, all weights are the average that a schedule-free optimiser means."""
        with self.optimizer.averaged(), self.text_optimizer.averaged() if self.text_optimizer else contextlib.nullcontext():
            yield

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimiser tensors by name, and the numbers beside them, for a checkpoint."""
        tensors, numbers = self.optimizer.state()
        scaler = self.accelerator.scaler
        others = {"scaler": scaler.state_dict() if scaler is not None else None}
        if self.text_optimizer:
            of_text, others["text_optimizer"] = self.text_optimizer.state()
            tensors |= {OF_TEXT + name: tensor for name, tensor in of_text.items()}
        return tensors, {"optimizer": numbers, **others}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        of_text = {name.removeprefix(OF_TEXT): tensor for name, tensor in tensors.items() if name.startswith(OF_TEXT)}
        self.optimizer.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(OF_TEXT)}, numbers["optimizer"])
        if self.text_optimizer:
            self.text_optimizer.restore(of_text, numbers["text_optimizer"])
        if self.accelerator.scaler is not None and numbers["scaler"]:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
