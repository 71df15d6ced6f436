"""From what was said to what it means: switches that stand for others, defaults that depend on other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.config.declare import show
from helpers.config.effect import Chosen
from helpers.config.facts import Facts
from helpers.config.lora_file import LoraFile, read_lora_file
from helpers.config.optimizer_rules import settle_optimizer
from helpers.config.sources import Options, Rank, Setting

DEFAULT_SNR_GAMMA = 5.0  # Hang et al. (2023), section 4

WITHOUT_DROPOUT = {"lora_algorithm": ("lokr", "loha"), "lora_init_type": ("pissa", "olora")}  # where its default is 0


def chosen_method(chosen: Chosen) -> str:
    """The key of the methods registry that several options choose together."""
    if chosen["controlnet"].value:
        return "controlnet"
    kind = str(chosen["model_type"].value)
    if kind == "lora" and chosen["lora_algorithm"].value in ("lokr", "loha"):
        return "lycoris"
    if kind == "full" and (chosen["use_bitfit"].value or chosen["freeze_unet_strategy"].value == "bitfit"):
        return "bitfit"
    return kind


def settle(chosen: Chosen, facts: Sequence[tuple[str, Facts]]) -> list[str]:
    """Settle `chosen` in place and return what contradicts itself; switches have been taken before.

    `facts` are the run's choices, each with its axis.
    """
    problems: list[str] = []
    for axis, choice in facts:
        _take_defaults(chosen, axis, choice)
    _adapter(chosen, problems)
    settle_optimizer(chosen)
    _min_snr(chosen, problems)
    _length(chosen, problems)
    _resume(chosen)
    _cache_folders(chosen)
    return problems


def _take_defaults(chosen: Chosen, axis: str, choice: Facts) -> None:
    for name, value in choice.defaults.items():
        if chosen[name].rank < Rank.FAMILY:
            chosen[name] = Setting(value, f"{axis} {choice.name}", Rank.FAMILY)


def take_switches(options: Options, chosen: Chosen) -> list[str]:
    """`--use_8bit_adam` and its like set the options they stand for, in place. Returns what contradicts itself."""
    problems: list[str] = []
    for item in options.values():
        said = chosen[item.name]
        for target, value in item.meaning(said.value).items():
            if target == item.name:
                chosen[target] = Setting(value, said.origin, said.rank)
            else:
                _imply(chosen, target, value, said, problems)
    return problems


def _imply(chosen: Chosen, target: str, value: Any, by: Setting, problems: list[str]) -> None:
    """Set `target` because of another setting, unless a stronger source says something else; as strong a one is a contradiction."""
    there = chosen[target]
    if there.value == value and there.rank >= by.rank:
        return
    if there.rank == by.rank:
        problems.append(f"{by.origin} means {target}={value}, but {there.origin} says {there.value}; remove one.")
    elif by.rank > there.rank:
        chosen[target] = Setting(value, by.origin, by.rank)


def _adapter(chosen: Chosen, problems: list[str]) -> None:
    """Dropout is off by itself where it cannot be; what an existing LoRA settles is taken from its file, or compared."""
    for name, values in WITHOUT_DROPOUT.items():
        if chosen[name].value in values and chosen["lora_dropout"].rank == Rank.DECLARED:
            chosen["lora_dropout"] = Setting(0.0, f"from {name}", Rank.DECLARED)
    start = chosen["init_lora"]
    if start.value is None or chosen["model_type"].value != "lora":
        return
    try:
        found = read_lora_file(start.value)
    except ValueError as error:
        problems.append(f"{start.origin}: {error}")
        return
    trains = chosen["train_text_encoder"]
    if found.train_text_encoder and not trains.value:
        problems.append(
            f"{start.origin}: {start.value} is a LoRA of the text encoders too; set --train_text_encoder to go on with them, or remove "
            "their layers from it."
        )
    elif trains.value and not found.train_text_encoder:
        problems.append(f"{start.origin}: {start.value} is a LoRA of the network alone; leave out one of it and {trains.origin}.")
    for name in (item.name for item in dataclasses.fields(LoraFile) if item.name not in ("train_text_encoder", "differing")):
        value, said = getattr(found, name), chosen[name]
        if said.rank <= Rank.FAMILY:
            chosen[name] = Setting(value, f"from {start.value.name}", Rank.FAMILY)
        elif name in ("lora_rank", "lora_alpha") and found.differing:
            if said.rank >= Rank.EXTRA_ARGS:  # from a variable it does nothing, and `layers_kept` says so
                problems.append(f"{said.origin}: the layers of {start.value} have {found.differing}, which they keep; remove it.")
        elif said.value != value:
            problems.append(f"{said.origin} is {show(said.value)}, but {start.value} has {show(value)}; leave it out, or set it to that.")


def layers_kept(chosen: Mapping[str, Setting]) -> Iterator[str]:
    """Variables for rank and alpha that a file of --init_lora whose layers differ does not follow."""
    start = chosen["init_lora"].value
    said = [chosen[name].origin for name in ("lora_rank", "lora_alpha") if chosen[name].rank > Rank.FAMILY]
    if start is None or chosen["model_type"].value != "lora" or not said:
        return
    if differing := read_lora_file(start).differing:
        yield f"{' and '.join(said)} {'do' if len(said) > 1 else 'does'} nothing: the layers of {start} have {differing}, which they keep."


def _min_snr(chosen: Chosen, problems: list[str]) -> None:
    """A gamma asks for min-SNR weighting, and the weighting for a gamma; afterwards gamma is None or above 0."""
    weighting, sigma_data = chosen["loss_weighting"], chosen["soft_min_snr_sigma_data"]
    if weighting.value == "soft_min_snr" and sigma_data.value:
        _imply(chosen, "snr_gamma", 1 / sigma_data.value**2, sigma_data, problems)
    gamma = chosen["snr_gamma"]
    if gamma.value:
        if weighting.value != "soft_min_snr":  # it has a gamma too
            _imply(chosen, "loss_weighting", "min_snr", gamma, problems)
        return
    if weighting.value in ("min_snr", "soft_min_snr"):
        if gamma.value == 0 and gamma.rank == weighting.rank:
            problems.append(f"{gamma.origin} is 0, which turns min-SNR off, but {weighting.origin} asks for it; remove one.")
        chosen["snr_gamma"] = Setting(DEFAULT_SNR_GAMMA, "from loss_weighting", Rank.DECLARED)
    elif gamma.value == 0:
        chosen["snr_gamma"] = Setting(None, gamma.origin, gamma.rank)


def _length(chosen: Chosen, problems: list[str]) -> None:
    """Afterwards one of max_train_steps and num_train_epochs is above 0, and the other is None or 0."""
    steps, epochs = chosen["max_train_steps"], chosen["num_train_epochs"]
    if steps.value and epochs.value and epochs.rank > Rank.DECLARED and steps.rank == epochs.rank:
        problems.append(
            f"{steps.origin} ({steps.value}) and {epochs.origin} ({epochs.value}) both say when training ends; set one of them to 0."
        )
    if not steps.value and not epochs.value:
        problems.append("max_train_steps and num_train_epochs are both 0; say with one of them how long to train.")
    elif steps.value and steps.rank >= epochs.rank:
        chosen["num_train_epochs"] = Setting(0, "max_train_steps is set", Rank.DECLARED)
    elif epochs.value:
        chosen["max_train_steps"] = Setting(None, "num_train_epochs is set", Rank.DECLARED)
    else:  # epochs=0 from a stronger source than the steps: it does not take them back
        chosen["num_train_epochs"] = Setting(0, epochs.origin, epochs.rank)


def _resume(chosen: Chosen) -> None:
    asked = chosen["resume_from_checkpoint"]
    if asked.value is not None and asked.value.lower() == "none":
        chosen["resume_from_checkpoint"] = Setting(None, asked.origin, asked.rank)


def _cache_folders(chosen: Chosen) -> None:
    """Caches live under OUTPUT_DIR unless a folder is named."""
    _take_folder(chosen, "cache_dir", chosen["output_dir"].value / "cache", "inside output_dir")
    _take_folder(chosen, "cache_dir_vae", chosen["cache_dir"].value / "latents", "inside cache_dir")
    _take_folder(chosen, "cache_dir_text", chosen["cache_dir"].value / "text", "inside cache_dir")


def _take_folder(chosen: Chosen, name: str, folder: Path, origin: str) -> None:
    if chosen[name].value is None:
        chosen[name] = Setting(folder, origin, Rank.DECLARED)
