"""Saves and restores the state of any torch optimizer as tensors by name and JSON values, without pickle.

State belongs to a parameter, to the parameter group (a step counter, an estimated step size) or to a plain key (counters of a few
libraries). Of a group, only entries that steps have changed are state. The others are settings, which a resumed run sets itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SET_BEFORE_EACH_STEP = ("params", "lr")


def varying_entries(optimizer: Optimizer) -> list[dict[str, Any]]:
    """A copy of each parameter group's entries, to find out later which of them steps have changed."""
    return [
        {entry: _copied(value) for entry, value in group.items() if entry not in SET_BEFORE_EACH_STEP} for group in optimizer.param_groups
    ]


def collect_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], initial: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors named `<parameter>/<entry>`, and everything else as JSON values. `initial`: `varying_entries` of the new optimizer.

    Raises TypeError for state other than tensors, numbers, strings, and lists, tuples or dicts of them.
    """
    writing = _Writing()
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            written = writing.value(value, f"{name}/{entry}")
            if written != {"tensor": f"{name}/{entry}"}:  # the usual case: the tensor's name says it all
                by_parameter.setdefault(name, {})[entry] = written
    changed = [
        {
            entry: writing.value(value, f"/group/{number}/{entry}")
            for entry, value in group.items()
            if entry not in SET_BEFORE_EACH_STEP and not (entry in before and _same(value, before[entry]))
        }
        for number, (group, before) in enumerate(zip(optimizer.param_groups, initial, strict=True))
    ]
    owners = {id(parameter) for parameter in parameters.values()}
    others = {str(key): writing.value(value, f"/other/{key}") for key, value in optimizer.state.items() if id(key) not in owners}
    return writing.tensors, {"parameters": by_parameter, "groups": changed, "other": others}


def restore_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Restore the result of `collect_state`, in its own precision and on the devices that this optimizer uses."""
    reading = _Reading(tensors)
    first = next(iter(parameters.values()))
    for name, entries in values["parameters"].items():
        for entry, written in entries.items():
            optimizer.state[parameters[name]][entry] = reading.value(written, parameters[name].device)
    for group, entries in zip(optimizer.param_groups, values["groups"], strict=True):
        for entry, written in entries.items():
            group[entry] = reading.value(written, first.device)
    for key, written in values["other"].items():
        optimizer.state[key] = reading.value(written, first.device)  # counters of a few libraries
    for full_name, tensor in tensors.items():
        name, entry = full_name.rsplit("/", 1)
        if name in parameters:  # the others are parts of values restored above
            placed = reading.read[full_name] if full_name in reading.read else _placed(optimizer, parameters[name], entry, tensor)
            optimizer.state[parameters[name]][entry] = placed


def _placed(optimizer: Any, parameter: nn.Parameter, entry: str, value: Tensor) -> Tensor:
    """A parameter's entry on the device that the optimizer expects: torch's step counters on the CPU, paged moments in paged memory."""
    if entry == "step" and value.ndim == 0 and not optimizer.param_groups[0].get("fused"):
        return value.cpu()
    if entry in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
        return buffer.copy_(value)
    return value.to(parameter.device)


class _Writing:
    """Turns values into JSON with names in place of tensors. A tensor that occurs twice is written once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def value(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            strides = {} if value.is_contiguous() else {"strides": list(value.stride())}  # the layout affects how products are rounded
            return {"tensor": self._tensor(value.detach(), name), **strides}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return {type(value).__name__: [self.value(item, f"{name}/{index}") for index, item in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, str | int | float) for key in value):
            return {"dict": [[key, self.value(item, f"{name}/{key}")] for key, item in value.items()]}
        raise TypeError(f"its state holds a {type(value).__name__} ({name}), which a checkpoint cannot store")

    def _tensor(self, tensor: Tensor, name: str) -> str:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        known = self._names.setdefault(place, name) if tensor.numel() else name
        if known == name:
            is_view = tensor.untyped_storage().nbytes() != tensor.nbytes  # safetensors refuses views
            self.tensors[name] = tensor.clone() if is_view else tensor
        return known


class _Reading:
    """The inverse of `_Writing`. A tensor that occurred twice is one shared tensor again."""

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
