"""The optimizers by name, and how any other is written. Nothing is imported, so a mistake is reported before torch is loaded."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config.suggest import did_you_mean

_CLASS = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")
# Where a class is looked for whose name a user gives alone: (module to import it from, folder of its package that defines it).
_SEARCHED = (
    ("torch.optim", "torch/optim"),
    ("bitsandbytes.optim", "bitsandbytes/optim"),
    ("pytorch_optimizer", "pytorch_optimizer/optimizer"),
    ("schedulefree", "schedulefree"),
    ("prodigyopt", "prodigyopt"),
)


@dataclass(frozen=True)
class NamedClass:
    """An optimizer that has a name here."""

    place: str  # module:Class
    package: str = ""  # to install for it, if it is not installed anyway
    is_adamw: bool = False  # a variant of AdamW: --adam_beta1 and its like have AdamW's defaults
    finds_rate: bool = False  # it estimates the step size; the learning rate is a factor on the estimate, usually 1
    averages: bool = False  # it trains one set of weights and exports another, their average


OPTIMIZERS: Mapping[str, NamedClass] = {
    "adamw": NamedClass("torch.optim:AdamW", is_adamw=True),
    "adamw_bf16": NamedClass("helpers.training.adamw_bf16:AdamWBF16", is_adamw=True),
    "adamw8bit": NamedClass("bitsandbytes.optim:AdamW8bit", "bitsandbytes", is_adamw=True),
    "paged_adamw8bit": NamedClass("bitsandbytes.optim:PagedAdamW8bit", "bitsandbytes", is_adamw=True),
    "adafactor": NamedClass("transformers.optimization:Adafactor"),
    "prodigy": NamedClass("prodigyopt:Prodigy", "prodigyopt", is_adamw=True, finds_rate=True),
    "dadaptation": NamedClass("pytorch_optimizer:DAdaptAdam", "pytorch-optimizer", is_adamw=True, finds_rate=True),
    "lion": NamedClass("pytorch_optimizer:Lion", "pytorch-optimizer"),
    "lion8bit": NamedClass("bitsandbytes.optim:Lion8bit", "bitsandbytes"),
    "came": NamedClass("pytorch_optimizer:CAME", "pytorch-optimizer"),
    "schedulefree_adamw": NamedClass("schedulefree:AdamWScheduleFree", "schedulefree", is_adamw=True, averages=True),
    "sgd": NamedClass("torch.optim:SGD"),
}
AUTO = "auto"  # adamw_bf16 or adamw, as the method decides
NAMES = (AUTO, *OPTIMIZERS)
IS_ADAMW = frozenset((AUTO, *(name for name, known in OPTIMIZERS.items() if known.is_adamw)))
FINDS_RATE = frozenset(name for name, known in OPTIMIZERS.items() if known.finds_rate)
AVERAGES = frozenset(name for name, known in OPTIMIZERS.items() if known.averages)
ADAMW_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8}


def class_of(optimizer: str) -> NamedClass:
    """The class that a value of --optimizer other than auto stands for: of the table, or as the user wrote it."""
    return OPTIMIZERS.get(optimizer) or NamedClass(optimizer, optimizer.partition(":")[0].partition(".")[0])


def check_class(text: str) -> None:
    """ValueError unless `text`, which is no name of the table, is of the form module:Class; it says what to write instead."""
    if _CLASS.fullmatch(text):
        return
    names = ", ".join(NAMES)
    if found := find_class(text):
        raise ValueError(f"{text!r} is not one of {names}; write it by its class: --optimizer={found}")
    hint = did_you_mean(text, NAMES)
    raise ValueError(f"{text!r} is not one of {names}{hint}; write any other by its class, as in torch.optim:RAdam")


def find_class(name: str) -> str | None:
    """`soap` => `pytorch_optimizer:SOAP`: the class of an installed optimizer library with that name, letter case and _ aside.

    Reads the libraries' source files: importing one would import torch.
    """
    wanted = name.replace("_", "").lower()
    for module, folder in _SEARCHED:
        spec = importlib.util.find_spec(module.partition(".")[0])
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent.parent
        for file in sorted((root / folder).rglob("*.py")):
            for found in re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
                if found.lower() == wanted:
                    return f"{module}:{found}"
    return None


def parse_optimizer_args(text: str | None) -> dict[str, Any]:
    """`"betas=0.9,0.99 amsgrad=true name=x"` => arguments: numbers, true/false, none, tuples if there is a comma, otherwise words.

    ValueError says what cannot be read.
    """
    arguments: dict[str, Any] = {}
    for word in shlex.split(text or ""):
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r} is not of the form key=value")
        if key in arguments:
            raise ValueError(f"{key} is given twice")
        arguments[key] = _value(value)
    return arguments


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        return tuple(_value(part.strip()) for part in text.strip("()[]").split(",") if part.strip())
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text
