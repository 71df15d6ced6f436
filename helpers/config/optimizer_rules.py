"""Settings that depend on the optimizer: defaults, contradictions, and notes about unusual values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from helpers.config.declare import options_of
from helpers.config.effect import unmet_need
from helpers.config.libraries import lacking
from helpers.config.optimizers import (
    ADAMW_DEFAULTS,
    AUTO,
    AVERAGES,
    FINDS_RATE,
    IS_ADAMW,
    class_of,
    parse_optimizer_args,
)
from helpers.config.options import OptimizerOptions
from helpers.config.sources import Rank, Setting, said_by

CONSTANT = ("constant", "constant_with_warmup")
SMALLEST_FACTOR, LARGEST_FACTOR = 0.01, 100.0  # beyond them a learning rate cannot have been meant as a factor to an estimated one
LARGE_RATE = 0.1  # of an optimizer that does not estimate it


def settle_optimizer(chosen: dict[str, Setting]) -> None:
    """Set the defaults that depend on the optimizer."""
    name = chosen["optimizer"].value
    if name in IS_ADAMW:
        for option, value in ADAMW_DEFAULTS.items():
            if chosen[option].value is None:
                chosen[option] = Setting(value, f"optimizer {name}", Rank.DECLARED)
    if name == "adafactor":
        _prefer(chosen, "max_grad_norm", 0.0)  # it clips its own updates
    if name in FINDS_RATE:
        _prefer(chosen, "learning_rate", 1.0)
        _prefer(chosen, "lr_scheduler", "constant")
    if name in AVERAGES:
        _prefer(chosen, "lr_scheduler", "constant_with_warmup")
    if name == "dadaptation":
        rate, replaced = chosen["dadaptation_learning_rate"], chosen["learning_rate"]
        instead = f", instead of {replaced.origin}" if replaced.rank > Rank.PRESET else ""
        chosen["learning_rate"] = Setting(rate.value, f"dadaptation_learning_rate{instead}", replaced.rank)


def _prefer(chosen: dict[str, Setting], option: str, value: object) -> None:
    """Set an option that the user did not set."""
    if chosen[option].rank <= Rank.PRESET:
        chosen[option] = Setting(value, f"optimizer {chosen['optimizer'].value}", Rank.FAMILY)


def optimizer_problems(chosen: Mapping[str, Setting]) -> Iterator[str]:
    """One sentence, with options and remedy, for each setting of the optimizer that cannot be used."""
    yield from _arguments(chosen)
    yield from _rate(chosen)
    name = chosen["optimizer"].value
    if name == "adamw_bf16" and chosen["mixed_precision"].value == "fp16":
        yield "--optimizer=adamw_bf16 trains bf16 weights; it needs --mixed_precision=bf16, or choose --optimizer=adamw."
    if "paged" in name.lower() and chosen["optimizer_cpu_offload"].value:
        yield f"{said_by(chosen, 'optimizer_cpu_offload')}: {name} moves its state out of the way by itself; leave one of them out."
    if chosen["lr_scale"].value and (name in FINDS_RATE or chosen["adafactor_relative_step"].value):
        yield f"{said_by(chosen, 'lr_scale')}: {name} finds its learning rate by itself, of steps of any size; remove it."
    if name in AVERAGES and chosen["use_ema"].value:
        yield f"{said_by(chosen, 'use_ema')}: --optimizer={name} averages the weights itself; leave one of them out."


def _arguments(chosen: Mapping[str, Setting]) -> Iterator[str]:
    setting = chosen["optimizer_args"]
    try:
        arguments = parse_optimizer_args(setting.value)
    except ValueError as error:
        yield f"{setting.origin}: {error}; write it like 'betas=0.9,0.99 weight_decay=0.1'."
        return
    if "lr" in arguments:
        yield f"{setting.origin}: the learning rate is --learning_rate, not lr=; move it there."
    values = {option: setting.value for option, setting in chosen.items()}
    for item in options_of(OptimizerOptions):
        if item.argument in arguments and chosen[item.name].rank > Rank.PRESET and not unmet_need(item, values):
            yield f"{setting.origin} sets {item.argument}, and so does {chosen[item.name].origin}; remove one."


def _rate(chosen: Mapping[str, Setting]) -> Iterator[str]:
    name, rate = chosen["optimizer"].value, chosen["learning_rate"].value
    if name in FINDS_RATE and not SMALLEST_FACTOR <= rate <= LARGEST_FACTOR:
        finer = {"prodigy": " and tune it by --prodigy_learning_rate", "dadaptation": " as --dadaptation_learning_rate"}.get(name, "")
        yield (
            f"{said_by(chosen, 'learning_rate')}: {rate:g} is a factor to the learning rate that {name} finds by itself; say 1{finer}, "
            "or choose another --optimizer."
        )
    of_text = chosen["text_encoder_lr"].value
    if _relative_steps(chosen) and of_text is not None and chosen["train_text_encoder"].value:
        yield (
            f"{said_by(chosen, 'text_encoder_lr')}: adafactor sets its own rate with its relative step, for the text encoders too; "
            "leave one of them out."
        )
    if name in FINDS_RATE and of_text is not None and not SMALLEST_FACTOR <= of_text <= LARGEST_FACTOR:
        yield (
            f"{said_by(chosen, 'text_encoder_lr')}: {of_text:g} is a factor to the learning rate that {name} finds for the text encoders "
            "by itself; leave it out, or choose another --optimizer."
        )


def optimizer_notes(chosen: Mapping[str, Setting]) -> Iterator[str]:
    """Notes about settings that are possible but probably not intended."""
    name, rate, shape = chosen["optimizer"].value, chosen["learning_rate"], chosen["lr_scheduler"]
    if name in FINDS_RATE and not 0.1 < rate.value <= 10:
        yield f"{rate.origin}: {name} finds its learning rate by itself, and {rate.value:g} of it is far from the usual 1."
    if (name in IS_ADAMW - FINDS_RATE - AVERAGES or "lion" in name) and name not in FINDS_RATE and rate.value >= LARGE_RATE:
        yield f"{rate.origin}: {rate.value:g} is a very high learning rate for {name}, which hardly ever learns above 0.01."
    if name in AVERAGES and shape.value not in CONSTANT:
        yield f"{shape.origin}: {name} averages instead of lowering its learning rate; constant_with_warmup is usual, not {shape.value}."
    if _relative_steps(chosen):
        for setting in (chosen[option] for option in ("learning_rate", "lr_scheduler") if chosen[option].rank > Rank.PRESET):
            yield f"{setting.origin} does nothing while adafactor takes relative steps."


def highest_rate(optimizer: str, optimizer_args: str | None, adafactor_relative_step: bool, rate: float) -> str:
    """The peak of a learning rate in words. For some optimizers it is a factor of the rate that they estimate, or has no effect."""
    if optimizer in FINDS_RATE:
        return f"up to {rate:g} times the learning rate that {optimizer} finds for them"
    if _takes_relative_steps(optimizer, optimizer_args, adafactor_relative_step):
        return "the learning rate that adafactor sets by its relative step"
    return f"a learning rate of {rate:g} at most"


def _relative_steps(chosen: Mapping[str, Setting]) -> bool:
    """Whether Adafactor computes its learning rate from the step number."""
    return _takes_relative_steps(*(chosen[option].value for option in ("optimizer", "optimizer_args", "adafactor_relative_step")))


def _takes_relative_steps(optimizer: str, optimizer_args: str | None, asked: bool) -> bool:
    if optimizer != "adafactor":
        return False
    with contextlib.suppress(ValueError):  # unreadable arguments are reported by _arguments
        return bool(parse_optimizer_args(optimizer_args).get("relative_step", asked))
    return False


def missing_library(chosen: Mapping[str, Setting]) -> Iterator[str]:
    name = chosen["optimizer"].value
    if name == AUTO:
        return
    found = class_of(name)
    module = found.place.partition(":")[0].partition(".")[0]
    if found.package and (lacks := lacking(name, module, found.package)):
        yield f"{said_by(chosen, 'optimizer')}: {lacks}, or choose another."
