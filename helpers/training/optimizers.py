"""Optimisers by name, over named parameters, with a state that is plain tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from helpers.errors import ConfigError
from helpers.training.adamw_bf16 import AdamWBF16

if TYPE_CHECKING:
    from helpers.config.options import OptimizerOptions


def create_optimizer(options: OptimizerOptions, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimiser that the options name ("auto" has been settled), with Adam's settings.

    Its learning rate is set anew before each step.
    """
    arguments: dict[str, Any] = {
        "lr": 0.0,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    weights = list(parameters.values())
    if options.optimizer == "adamw_bf16":
        return AdamWBF16(weights, **arguments)
    if options.optimizer == "adamw8bit":
        return _adamw_8bit()(weights, **arguments)
    # One kernel over all weights, without a temporary copy of them; on the CPU the loop that is bit-equal on any build.
    on_cuda = all(weight.device.type == "cuda" for weight in weights)
    return torch.optim.AdamW(weights, **arguments, fused=True) if on_cuda else torch.optim.AdamW(weights, **arguments, foreach=False)


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"--optimizer=adamw8bit needs the bitsandbytes package, which cannot be imported here ({error}): "
            "install it with `pip install bitsandbytes`, or choose adamw or adamw_bf16."
        ) from error
    return AdamW8bit


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors named `<parameter>/<entry>`, and the entries that are numbers, for JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{entry}"] = value
            else:
                numbers[f"{name}/{entry}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put back exactly what `optimizer_state` gave: torch's own loader would cast moments to the weights' precision."""
    for full_name, value in [*tensors.items(), *numbers.items()]:
        name, entry = full_name.rsplit("/", 1)
        parameter = parameters[name]
        if isinstance(value, Tensor):
            value = value.to(_state_device(optimizer, value, parameter))
        optimizer.state[parameter][entry] = value


def _state_device(optimizer: Optimizer, value: Tensor, parameter: nn.Parameter) -> torch.device:
    counts_on_cpu = value.ndim == 0 and not optimizer.param_groups[0].get("fused")
    return torch.device("cpu") if counts_on_cpu else parameter.device
