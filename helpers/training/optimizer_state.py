"""The state of any torch optimiser as tensors by name and JSON values, without pickle, and back.

A state belongs to a parameter, to the group of parameters (a step counter, an estimated step size) or to nothing (a few libraries
count there). Of a group only what steps have changed is state; the rest are settings, and those of the present run count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SET_BEFORE_EACH_STEP = ("params", "lr")


def varying_entries(optimizer: Optimizer) -> dict[str, Any]:
    """The entries of its parameter group as they are now, to tell later which of them steps have changed."""
    [group] = optimizer.param_groups
    return {entry: _copied(value) for entry, value in group.items() if entry not in SET_BEFORE_EACH_STEP}


def collect_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], as_made: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors named `<parameter>/<entry>`, and everything else as JSON values. `as_made`: its `varying_entries` when it was new.

    Raises TypeError for a state that is no tensor, number, text, or list, tuple or dict of them.
    """
    writing = _Writing()
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            written = writing.value(value, f"{name}/{entry}")
            if written != {"tensor": f"{name}/{entry}"}:  # the usual case is told by the tensor's name
                by_parameter.setdefault(name, {})[entry] = written
    [group] = optimizer.param_groups
    changed = {
        entry: writing.value(value, f"/group/{entry}")
        for entry, value in group.items()
        if entry not in SET_BEFORE_EACH_STEP and not (entry in as_made and _same(value, as_made[entry]))
    }
    owners = {id(parameter) for parameter in parameters.values()}
    others = {str(key): writing.value(value, f"/other/{key}") for key, value in optimizer.state.items() if id(key) not in owners}
    return writing.tensors, {"parameters": by_parameter, "group": changed, "other": others}


def put_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `collect_state` gave, in its own precision and on the devices that this optimiser uses."""
    reading = _Reading(tensors)
    first = next(iter(parameters.values()))
    for name, entries in values["parameters"].items():
        for entry, written in entries.items():
            optimizer.state[parameters[name]][entry] = reading.value(written, parameters[name].device)
    for entry, written in values["group"].items():
        optimizer.param_groups[0][entry] = reading.value(written, first.device)
    for key, written in values["other"].items():
        optimizer.state[key] = reading.value(written, first.device)  # a few libraries keep counters by name
    for full_name, tensor in tensors.items():
        name, entry = full_name.rsplit("/", 1)
        if name in parameters:  # others are part of a value that is back already
            placed = reading.read[full_name] if full_name in reading.read else _placed(optimizer, parameters[name], entry, tensor)
            optimizer.state[parameters[name]][entry] = placed


def _placed(optimizer: Any, parameter: nn.Parameter, entry: str, value: Tensor) -> Tensor:
    """A parameter's entry where the optimiser wants it: counters of torch's own on the CPU, paged moments in paged memory."""
    if entry == "step" and value.ndim == 0 and not optimizer.param_groups[0].get("fused"):
        return value.cpu()
    if entry in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
        return buffer.copy_(value)
    return value.to(parameter.device)


class _Writing:
    """Turns values into JSON, with a name where a tensor is; a tensor that is there twice is written once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def value(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            strides = {} if value.is_contiguous() else {"strides": list(value.stride())}  # they decide how products are rounded
            return {"tensor": self._tensor(value.detach(), name), **strides}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return {type(value).__name__: [self.value(item, f"{name}/{index}") for index, item in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, str | int | float) for key in value):
            return {"dict": [[key, self.value(item, f"{name}/{key}")] for key, item in value.items()]}
        raise TypeError(f"its state holds a {type(value).__name__} ({name}), which a checkpoint cannot hold")

    def _tensor(self, tensor: Tensor, name: str) -> str:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        known = self._names.setdefault(place, name) if tensor.numel() else name
        if known == name:
            part_of_another = tensor.untyped_storage().nbytes() != tensor.nbytes  # a safetensors file holds no views
            self.tensors[name] = tensor.clone() if part_of_another else tensor
        return known


class _Reading:
    """The way back; a tensor that was there twice is the same one twice again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.read: dict[str, Tensor] = {}

    def value(self, written: Any, device: torch.device) -> Any:
        if not isinstance(written, dict):
            return written
        if "tensor" in written:
            return self._tensor(written["tensor"], written.get("strides"), device)
        [(kind, content)] = written.items()
        if kind == "dict":
            return {key: self.value(item, device) for key, item in content}
        items = [self.value(item, device) for item in content]
        return tuple(items) if kind == "tuple" else items

    def _tensor(self, name: str, strides: list[int] | None, device: torch.device) -> Tensor:
        if name not in self.read:
            stored = self._tensors[name]
            laid_out = stored if strides is None else torch.empty_strided(stored.shape, strides, dtype=stored.dtype).copy_(stored)
            self.read[name] = laid_out.to(device)
        return self.read[name]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(before, Tensor):
        return isinstance(value, Tensor) and isinstance(before, Tensor) and torch.equal(value, before)
    return type(value) is type(before) and value == before
