"""Optimizers by name, over named parameters; their state is plain tensors and JSON values."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from helpers.config.declare import options_of
from helpers.config.libraries import install
from helpers.config.optimizers import OPTIMIZERS, class_of, parse_optimizer_args
from helpers.config.suggest import did_you_mean
from helpers.errors import ConfigError
from helpers.training.optimizer_state import collect_state, restore_state, varying_entries

if TYPE_CHECKING:
    from helpers.config.options import OptimizerOptions

FACTOR = "lr_scale"  # entry of a parameter group: the factor on its learning rate
OURS = ("params", "lr")  # arguments that the trainer passes itself
TRIAL_SHAPES = {"matrix": (8, 4), "kernel": (4, 4, 3, 3), "bias": (8,)}


class NamedOptimizer:
    """A torch optimizer over named parameters: takes steps at a given learning rate, and saves and restores its whole state.

    `rate` is the peak of the schedule, which some optimizers compare later rates with; `scales` are factors on it for some parameters, each
    factor with a parameter group of its own. With `optimizer_cpu_offload`, the state and a copy
    of the weights are in CPU memory, and steps are taken there. Checkpoints are the same either way.
    """

    def __init__(
        self, options: OptimizerOptions, parameters: Mapping[str, nn.Parameter], rate: float, scales: Mapping[str, float] | None = None
    ) -> None:
        self.name = options.optimizer
        self.parameters = parameters
        self.stepped = copies_on_cpu(parameters) if options.optimizer_cpu_offload else parameters  # the weights that steps change
        self.torch_optimizer = create_optimizer(options, self.stepped, rate, scales or {})
        self.factors = [group.get(FACTOR, 1.0) for group in self.torch_optimizer.param_groups]
        self.averages = all(callable(getattr(self.torch_optimizer, mode, None)) for mode in ("train", "eval"))  # schedule-free
        # A loss scaler finds the gradients through an optimizer; an offloaded one does not hold those of the network.
        self.over_gradients = torch.optim.SGD(parameters.values(), lr=0.0) if self.offloaded else self.torch_optimizer
        if self.averages:
            self._mode("train")
        self._initial = varying_entries(self.torch_optimizer)

    def step(self, rate: float) -> None:
        """Update the weights with their gradients at this learning rate of the schedule."""
        for group, factor in zip(self.torch_optimizer.param_groups, self.factors, strict=True):
            group["lr"] = rate * factor
        if self.offloaded:
            self._fetch_gradients()
        self.torch_optimizer.step()
        self._copy_back()

    @property
    def offloaded(self) -> bool:
        return self.stepped is not self.parameters

    def zero_grad(self) -> None:
        for parameter in (*self.parameters.values(), *self.stepped.values()):
            parameter.grad = None

    def effective(self, rate: float) -> float:
        """The learning rate that the next step really uses: times the estimated `d` of Prodigy and D-Adaptation.

        For Adafactor's relative step, it is the value before multiplication with each weight's scale. With several parameter groups, it is
        the rate before their factors.
        """
        group = self.torch_optimizer.param_groups[0]
        if group.get("relative_step"):
            step = 1 + next((state["step"] for state in self.torch_optimizer.state.values()), 0)
            return min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
        return rate * float(group.get("d", 1.0))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are the average of a schedule-free optimizer; afterwards the trained weights, bit for bit.

        The optimizer's own way back rounds, so the trained weights are kept and restored here.
        """
        if not self.averages or not self.torch_optimizer.state:
            yield
            return
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._mode("eval")
        self._copy_back()
        try:
            yield
        finally:
            self._mode("train")
            self._set_weights(trained)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything except weights and settings that the next step depends on: tensors by name, and JSON values."""
        tensors, values = collect_state(self.torch_optimizer, self.stepped, self._initial)
        if self.averages:  # the weights in a checkpoint are the average
            tensors |= {f"/trained/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore exactly what `state` returned. (torch's own loader would cast moments to the weights' precision.)"""
        trained = {name.removeprefix("/trained/"): tensor for name, tensor in tensors.items() if name.startswith("/trained/")}
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("/trained/")}
        if self.offloaded:  # the network's weights have already been restored
            self._set_weights({name: parameter.detach() for name, parameter in self.parameters.items()})
        restore_state(self.torch_optimizer, self.stepped, rest, values)
        self._set_weights(trained)

    def _mode(self, name: str) -> None:
        getattr(self.torch_optimizer, name)()

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            self.stepped[name].copy_(tensor)
        self._copy_back()

    @torch.no_grad()
    def _fetch_gradients(self) -> None:
        """Copy the network's gradients to CPU memory, and wait for them."""
        for name, parameter in self.parameters.items():
            target = self.stepped[name]
            target.grad = None if parameter.grad is None else torch.empty_like(target, pin_memory=target.is_pinned())
            if parameter.grad is not None and target.grad is not None:
                target.grad.copy_(parameter.grad, non_blocking=True)
        device = next(iter(self.parameters.values())).device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    @torch.no_grad()
    def _copy_back(self) -> None:
        """Copy offloaded weights back to the network."""
        if self.offloaded:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.stepped[name], non_blocking=True)


def copies_on_cpu(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Copies of the weights in CPU memory, pinned if the weights are on a CUDA device, which makes transfers fast."""
    copies = {}
    for name, parameter in parameters.items():
        values = parameter.detach().to("cpu", copy=True)
        copies[name] = nn.Parameter(values.pin_memory() if parameter.device.type == "cuda" else values)
    return copies


def check_optimizer(options: OptimizerOptions, rate: float, device: torch.device, scaled: bool = False) -> None:
    """Take a few steps with a few weights, so that an unsuitable optimizer is found before hours of caching. Raises ConfigError.

    Half-way one optimizer is replaced by a new one with its state, as in a resumed run; both must end with the same weights. With `scaled`
    one of the weights has a learning rate of its own.
    """
    scales = {next(reversed(TRIAL_SHAPES)): 0.5} if scaled else {}
    whole, resumed = _trial_weights(device), _trial_weights(device)
    optimizer = NamedOptimizer(options, whole, rate, scales)
    try:
        _trial_step(optimizer, rate)
        tensors, values = optimizer.state()
        for name, tensor in {name: parameter.detach() for name, parameter in whole.items()}.items():
            resumed[name].data.copy_(tensor)
        again = NamedOptimizer(options, resumed, rate, scales)
        again.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))
        for each in (optimizer, again):
            _trial_step(each, rate)
    except ConfigError:
        raise
    except Exception as error:  # the library's own, of any kind
        layers = " with a learning rate for each layer (lr_scale in --lora_layers)" if scaled else ""
        raise ConfigError(f"--optimizer={options.optimizer} cannot train here{_with(options)}{layers}: {error}") from error
    if any(not torch.equal(whole[name], resumed[name]) for name in whole):
        raise ConfigError(
            f"--optimizer={options.optimizer} cannot be used: its state does not hold all that its next step depends on, so a resumed run "
            "would differ. Choose another."
        )


def _trial_weights(device: torch.device) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full(shape, 0.5, device=device)) for name, shape in TRIAL_SHAPES.items()}


def _trial_step(optimizer: NamedOptimizer, rate: float) -> None:
    """One step along fixed gradients, with the random numbers that the engine gives each step. ConfigError if it sets its own rate."""
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.linspace(-0.1, 0.2, parameter.numel(), device=parameter.device).reshape(parameter.shape)
    devices = [parameter.device for parameter in optimizer.parameters.values() if parameter.device.type == "cuda"]
    with torch.random.fork_rng(devices[:1]):
        torch.manual_seed(0)
        optimizer.step(rate)
    group = optimizer.torch_optimizer.param_groups[0]
    if group["lr"] is not None and float(group["lr"]) != rate * optimizer.factors[0]:
        raise ConfigError(f"--optimizer={optimizer.name} sets its learning rate itself, against --lr_scheduler. Choose another.")


def create_optimizer(
    options: OptimizerOptions, parameters: Mapping[str, nn.Parameter], rate: float, scales: Mapping[str, float] | None = None
) -> Optimizer:
    """The optimizer that the options name ("auto" is already resolved). Its learning rate is set before each step.

    Parameters with a factor in `scales` have a parameter group for each factor, which is its entry FACTOR.

    Raises ConfigError for arguments that it does not have or refuses.
    """
    name, weights = options.optimizer, list(parameters.values())
    make = _import_class(name)
    known = [argument for argument, kind in inspect.signature(make).parameters.items() if _can_be_given(argument, kind)]
    arguments = _chosen_arguments(options, make)
    if name == "adamw":
        # CUDA: one kernel over all weights, without a temporary copy. CPU: the loop, which gives equal bits on any build of torch.
        on_cuda = all(weight.device.type == "cuda" for weight in weights)
        arguments |= {"fused": True} if on_cuda else {"foreach": False}
    extra = parse_optimizer_args(options.optimizer_args)
    for argument in extra:
        if argument not in known:
            raise ConfigError(
                f"--optimizer_args: {name} has no argument {argument}{did_you_mean(argument, known)}; it has {', '.join(known)}."
            )
    if name == "adafactor" and (arguments | extra).get("relative_step"):
        rates: dict[str, Any] = {"lr": None}
    else:
        rates = {"lr": rate}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # prodigyopt prints a line
            return make(_groups(parameters, rates["lr"], scales or {}), **rates, **(arguments | extra))
    except Exception as error:  # libraries raise all kinds
        raise ConfigError(f"--optimizer={name} rejects its settings{_with(options)}: {error}") from error


def _groups(parameters: Mapping[str, nn.Parameter], rate: float | None, scales: Mapping[str, float]) -> list[Any]:
    """The weights, or a parameter group for each factor on their learning rate."""
    factors = {name: scales.get(name, 1.0) for name in parameters}
    if set(factors.values()) == {1.0}:
        return list(parameters.values())
    return [
        {
            "params": [parameters[name] for name, own in factors.items() if own == factor],
            "lr": None if rate is None else rate * factor,
            FACTOR: factor,
        }
        for factor in dict.fromkeys(factors.values())
    ]


def _can_be_given(argument: str, kind: inspect.Parameter) -> bool:
    return argument not in OURS and kind.kind is not inspect.Parameter.VAR_KEYWORD


def _with(options: OptimizerOptions) -> str:
    return f" with --optimizer_args={options.optimizer_args!r}" if options.optimizer_args else ""


def _import_class(name: str) -> Callable[..., Optimizer]:
    """ConfigError if the class cannot be imported, naming the package to install, or is not a torch optimizer."""
    known = class_of(name)
    module, _, attribute = known.place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the library's code, which may fail in any way
        remedy = f"{install(known.package)}, or choose adamw or adamw_bf16" if name in OPTIMIZERS else "check module and class"
        raise ConfigError(f"--optimizer={name}: {known.place} cannot be imported ({error}); {remedy}.") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"--optimizer={name}: {found!r} is not a class of torch optimizers. Name one.")
    return found


def _chosen_arguments(options: OptimizerOptions, make: Callable[..., Optimizer]) -> dict[str, Any]:
    """The optimizer's arguments from the options. Options that are None keep the optimizer's own defaults.

    Raises ConfigError for an option that the optimizer does not have.
    """
    name = options.optimizer
    if name == "prodigy":
        own = [item for item in options_of(type(options)) if item.name.startswith("prodigy_")]
        betas = {"betas": (options.adam_beta1, options.adam_beta2)}
        return betas | {item.argument: getattr(options, item.name) for item in own}
    arguments = _adam_arguments(options, make)
    if name == "dadaptation":
        arguments["weight_decouple"] = True
    if name == "adafactor":
        relative = options.adafactor_relative_step
        arguments |= {"relative_step": relative, "scale_parameter": relative}
    return arguments


def _adam_arguments(options: OptimizerOptions, make: Callable[..., Optimizer]) -> dict[str, Any]:
    known = inspect.signature(make).parameters
    arguments: dict[str, Any] = {}
    for flag, argument, value in (
        ("adam_weight_decay", "weight_decay", options.adam_weight_decay),
        ("adam_epsilon", "eps", options.adam_epsilon),
    ):
        if value is None:
            continue
        if argument not in known or isinstance(known[argument].default, tuple):
            raise ConfigError(f"--{flag} {value:g}: {options.optimizer} has no such setting; remove it.")
        arguments[argument] = value
    betas = (options.adam_beta1, options.adam_beta2)
    if betas == (None, None):
        return arguments
    usual = known["betas"].default if "betas" in known else None
    if not isinstance(usual, tuple) or len(usual) != 2:
        reason = f"has {len(usual)} betas; set them with --optimizer_args 'betas=...'" if usual else "has no betas; remove it"
        raise ConfigError(f"--adam_beta{1 if betas[0] is not None else 2}: {options.optimizer} {reason}.")
    arguments["betas"] = tuple(mine if mine is not None else its for mine, its in zip(betas, usual, strict=True))
    return arguments
