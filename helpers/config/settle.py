"""From what was said to what it means: switches that stand for others, defaults that depend on other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.config.declare import options_of, show
from helpers.config.facts import Facts
from helpers.config.lora_file import LoraFile, read_lora_file
from helpers.config.optimizer_rules import optimizer_notes, settle_optimizer
from helpers.config.options import OPTIONS, AdapterOptions
from helpers.config.sources import Options, Rank, Setting

Chosen = dict[str, Setting]
DEFAULT_SNR_GAMMA = 5.0  # Hang et al. (2023), section 4

ADAPTER_OPTIONS = tuple(item.name for item in options_of(AdapterOptions))
FREEZING = ("freeze_encoder_strategy", "freeze_encoder_before", "freeze_encoder_after")
TEXT_ENCODER_OPTIONS = (*FREEZING, "freeze_encoder", "text_encoder_lr", "text_encoder_limit")
WITHOUT_DROPOUT = {"lora_algorithm": ("lokr", "loha"), "lora_init_type": ("pissa", "olora")}  # where its default is 0

# What has an effect only beside another setting: (options, the other, the values of it that they need).
DEPENDENT: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (ADAPTER_OPTIONS, "model_type", ("lora",)),
    (("controlnet_model_name_or_path",), "controlnet", (True,)),
    (("lokr_factor",), "lora_algorithm", ("lokr",)),
    (("training_scheduler_timestep_spacing",), "model_type", ("full",)),  # it stands in the scheduler of an exported pipeline
    (("logit_mean", "logit_std"), "weighting_scheme", ("logit_normal",)),
    (("mode_scale",), "weighting_scheme", ("mode",)),
    (TEXT_ENCODER_OPTIONS, "train_text_encoder", (True,)),
    ((*FREEZING, "freeze_encoder"), "model_type", ("full",)),
    (FREEZING, "freeze_encoder", (True,)),
    (("freeze_encoder_before",), "freeze_encoder_strategy", ("before", "between", "outside")),
    (("freeze_encoder_after",), "freeze_encoder_strategy", ("after", "between", "outside")),
    (("cache_dir_text",), "train_text_encoder", (False,)),
    (("huber_delta",), "loss", ("huber",)),
    (("snr_weight",), "loss_weighting", ("none",)),
    (("soft_min_snr_sigma_data",), "loss_weighting", ("soft_min_snr",)),
    (("timestep_bias_multiplier",), "timestep_bias_strategy", ("earlier", "later", "range")),
    (("timestep_bias_portion",), "timestep_bias_strategy", ("earlier", "later")),
    (("timestep_bias_begin", "timestep_bias_end"), "timestep_bias_strategy", ("range",)),
    (("noise_offset", "noise_offset_probability"), "offset_noise", (True,)),
    (("ema_decay", "ema_device", "ema_cpu_only", "ema_update_interval"), "use_ema", (True,)),
    (("adafactor_relative_step",), "optimizer", ("adafactor",)),
    (tuple(name for name in OPTIONS if name.startswith("prodigy_")), "optimizer", ("prodigy",)),
    (("dadaptation_learning_rate",), "optimizer", ("dadaptation",)),
    (("lr_warmup_steps",), "lr_scheduler", tuple(name for name in OPTIONS["lr_scheduler"].choices if name != "constant")),
    (("lr_power",), "lr_scheduler", ("polynomial",)),
    (("lr_num_cycles",), "lr_scheduler", ("cosine_with_restarts",)),
    (("lr_end",), "lr_scheduler", ("linear", "sine", "cosine", "cosine_with_restarts", "polynomial")),
    (("push_checkpoints_to_hub", "hub_model_id"), "push_to_hub", (True,)),
    (("validation_seed",), "validation_randomize", (False,)),
    (("validation_torch_compile_mode",), "validation_torch_compile", (True,)),
)


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
    for name in (item.name for item in dataclasses.fields(LoraFile) if item.name != "train_text_encoder"):
        value, said = getattr(found, name), chosen[name]
        if said.rank <= Rank.FAMILY:
            chosen[name] = Setting(value, f"from {start.value.name}", Rank.FAMILY)
        elif said.value != value:
            problems.append(f"{said.origin} is {show(said.value)}, but {start.value} has {show(value)}; leave it out, or set it to that.")


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


def without_effect(options: Options, chosen: Mapping[str, Setting]) -> Iterator[str]:
    """One sentence for every setting the user made that changes nothing."""
    for item in options.values():
        setting = chosen[item.name]
        if item.does_nothing and setting.value != item.default:
            yield f"{setting.origin} does nothing: {item.does_nothing}."
    for names, other, needed in DEPENDENT:
        if chosen[other].value in needed:
            continue
        for name, setting in ((name, chosen[name]) for name in names):
            if setting.rank > Rank.PRESET and setting.value is not None and (setting.value or OPTIONS[name].default):
                yield f"{setting.origin} does nothing while {other} is {_word(chosen[other].value)}."
    yield from _of_another_place(chosen)
    yield from optimizer_notes(chosen)


def _of_another_place(chosen: Mapping[str, Setting]) -> Iterator[str]:
    """What says where to find a base model that is found elsewhere."""
    model = Path(chosen["pretrained_model_name_or_path"].value or "").expanduser()
    if not chosen["pretrained_model_name_or_path"].value or not model.exists():
        return
    if chosen["revision"].value is not None:
        yield f"{chosen['revision'].origin} does nothing: the base model is on this machine, and not on the hub."
    if chosen["single_file_config"].value is not None and model.is_dir():
        yield f"{chosen['single_file_config'].origin} does nothing: the base model is a folder, and no single file."


def _word(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
