"""Turns the micro-batches of a step into one update of the weights, on any number of processes."""

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

TEXT_PREFIX = "/text/"  # of tensor names in checkpoints: the state of the text encoders' optimizer


@dataclass(frozen=True)
class Update:
    """The result of one optimizer step."""

    loss: float  # mean over the samples of the global step; 0 if there are none
    samples: int  # in the global step, without those that could not be read
    grad_norm: float  # of the whole gradient, before clipping
    learning_rate: float  # used by the optimizer: the schedule's, times `d` for optimizers that estimate it
    taken: bool  # False: loss or gradient was not finite, or there was no sample, so the weights are unchanged
    stop_asked: bool  # of any process, so that all processes stop at the same step
    save_asked: bool  # of any process, by the file SAVE
    text_learning_rate: float | None  # of the text encoders: 0 once they are frozen, None if none is trained


class Engine:
    """Backward, all-reduce, clip, finite check and optimizer step, over accelerate.

    The loss of a step is sum(weight x loss) over its samples, divided by the number of samples in the *global* step, so a short
    micro-batch counts by its size. Planned samples that could not be read do not count. Accumulation is done here: only the last
    micro-batch synchronizes gradients between processes.

    Trained text encoders have an optimizer of their own. Its learning rate is the schedule's times `text_rate`; from step `text_stop`
    on, counted from 0, it takes no steps. The gradient is clipped by its norm over all networks.
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
        self.optimizer = NamedOptimizer(options, denoiser, schedule.rate, trainable.lr_scales)
        self.text_optimizer = NamedOptimizer(options, text, schedule.rate * text_rate, trainable.lr_scales) if text else None
        self.denoiser: nn.Module = self.accelerator.prepare_model(trainable.denoiser, device_placement=False)
        self.text_encoders: dict[str, nn.Module] = {
            role: self.accelerator.prepare_model(module, device_placement=False) for role, module in trainable.text_encoders.items()
        }
        low_precision = [parameter for parameter in self.parameters.values() if parameter.dtype != torch.float32]
        self._sums = Float32Gradients(self.parameters.values()) if gradient_precision == "fp32" and low_precision else None
        self._samples = 0
        self._loss = torch.zeros((), dtype=torch.float64, device="cpu" if runtime.device.type == "mps" else runtime.device)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Wraps the forward and backward pass of a micro-batch; `last` marks this process's last one of the step.

        Its backward pass synchronizes gradients between processes; DDP has to know that before the forward pass.
        """
        synchronize = last and self._sums is None  # float32 sums are synchronized when they are complete
        with contextlib.ExitStack() as unsynchronized:
            for module in () if synchronize else (self.denoiser, *self.text_encoders.values()):
                unsynchronized.enter_context(self.accelerator.no_sync(module))
            yield

    def backward(self, losses: Tensor, weights: Tensor, global_samples: int, samples: int | None = None) -> None:
        """Add a micro-batch's gradient. losses (B,), weights (B,).

        `samples` is their number if it is not B: 0 for a placeholder batch, whose weights are 0. DDP averages over processes, so the
        loss is multiplied by their number.
        """
        total = (losses * weights).sum()
        self._samples += len(losses) if samples is None else samples
        self._loss += total.detach().to(self._loss.device).double()  # in this order: MPS has no float64
        scaled = total * (self.runtime.world_size / global_samples)
        self.accelerator.backward(scaled)
        if self._sums is not None:
            self._sums.take()

    def step(self, seed: int, step: int, updates: int, global_samples: int) -> Update:
        """Apply the accumulated gradient of a step of `global_samples` planned samples.

        `updates` is the number of optimizer steps taken so far, which the schedule depends on.
        """
        active = [self.optimizer, *([self.text_optimizer] if self.text_optimizer and step < self.text_stop else [])]
        self._complete_gradients(active)
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        finite = bool(torch.isfinite(grad_norm))
        request = self.runtime.stop
        local = (self._loss.item(), float(self._samples), float(not finite), float(request.asked), float(request.take_save_request()))
        loss_sum, samples, bad, stop, save = self.runtime.sum(*local)
        if 0 < samples < global_samples:
            torch._foreach_mul_(grads, global_samples / samples)
            grad_norm = grad_norm * (global_samples / samples)
        limit = self.options.max_grad_norm
        nn.utils.clip_grads_with_norm_(self.parameters.values(), limit if limit > 0 else float("inf"), grad_norm)
        rates = {optimizer: self.schedule(updates) * (self.text_rate if optimizer is self.text_optimizer else 1.0) for optimizer in active}
        used = {optimizer: optimizer.effective(rate) for optimizer, rate in rates.items()}
        taken = not bad and math.isfinite(loss_sum) and samples > 0
        if taken:
            self.runtime.seed("rounding", seed, step)  # the same on every process: each updates its own copy of the weights
            for optimizer, rate in rates.items():
                optimizer.step(rate)
        self._reset(active)
        return Update(
            loss=loss_sum / max(samples, 1),
            samples=int(samples),
            grad_norm=float(grad_norm),
            learning_rate=used[self.optimizer],
            taken=taken,
            stop_asked=bool(stop),
            save_asked=bool(save),
            text_learning_rate=used.get(self.text_optimizer, 0.0) if self.text_optimizer else None,
        )

    def _complete_gradients(self, active: Sequence[NamedOptimizer]) -> None:
        """Set the final gradients: summed over micro-batches, and unscaled for fp16."""
        if self._sums is not None:
            self._sums.give(self.runtime.world_size)
        if self.accelerator.scaler is not None:
            for optimizer in active:
                self.accelerator.scaler.unscale_(optimizer.over_gradients)

    def _reset(self, active: Sequence[NamedOptimizer]) -> None:
        """Clear gradients, loss and counters for the next step."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # halves the scale where `unscale_` met an overflow
        for optimizer in active:
            optimizer.zero_grad()
        self._loss.zero_()
        self._samples = 0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, all weights are the averages of a schedule-free optimizer."""
        with self.optimizer.averaged(), self.text_optimizer.averaged() if self.text_optimizer else contextlib.nullcontext():
            yield

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer tensors by name, and the remaining state as JSON values, for a checkpoint."""
        tensors, values = self.optimizer.state()
        scaler = self.accelerator.scaler
        others = {"scaler": scaler.state_dict() if scaler is not None else None}
        if self.text_optimizer:
            of_text, others["text_optimizer"] = self.text_optimizer.state()
            tensors |= {TEXT_PREFIX + name: tensor for name, tensor in of_text.items()}
        return tensors, {"optimizer": values, **others}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        of_text = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(TEXT_PREFIX)}
        self.optimizer.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(TEXT_PREFIX)}, values["optimizer"])
        if self.text_optimizer:
            self.text_optimizer.restore(of_text, values["text_optimizer"])
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
