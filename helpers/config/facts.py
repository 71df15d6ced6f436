"""What a family, a method or an objective declares before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from helpers.config.declare import Option

Settings = Mapping[str, object]  # option name -> effective value, before the Config is built
SAME_SIZE = 1.25  # the factor up to which the edge of pictures counts as that which a family is for


def no_objection(settings: Settings) -> Iterable[str]:
    return ()


def every_index(index: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Facts:
    """What one choice on an axis (a family, a method, an objective) declares without importing torch.

    `defaults` replace the declared defaults of options that the user did not set. `judge` yields one sentence for every setting that
    this choice refuses, naming the option and the remedy.
    """

    name: str  # in the registry
    title: str  # in messages
    defaults: Settings = field(default_factory=dict)
    _: KW_ONLY
    judge: Callable[[Settings], Iterable[str]] = no_objection
    instead: Mapping[str, str] = field(default_factory=dict)  # option of another objective => what to use here


@dataclass(frozen=True)
class Miniature:
    """A tiny model of a family: its real architecture and file layout, random weights (helpers/families/tiny.py).

    The rest is what tests expect of it: trained on four samples again and again, `learns_in` steps bring the loss below `learns_to`,
    at `rate` times the usual learning rates.
    """

    name: str  # by which it is written
    writer: str  # "package.module:function": (folder, seed=) => the folder
    learns_in: int = 60
    learns_to: float = 0.03
    rate: float = 1.0
    drops_to_zeros: bool = False  # a dropped caption is zeros, not the empty caption
    kohya: bool = False  # its LoRA is written in kohya's layout too


@dataclass(frozen=True)
class SingleFile:
    """Base models in one .safetensors file that the family converts itself: the network, without the other parts of the model."""

    tensors: tuple[str, ...]  # a file of the family has one of these
    convert: str  # "package.module:function": (file, header, folder of a model with the other parts, target) => notes for the run


@dataclass(frozen=True)
class FamilyFacts(Facts):
    """What a family of base models declares beside that.

    A family declares options of its own in a section: a frozen dataclass of `option(...)` fields whose docstring is "Title: what it is
    about." It is a section of OPTIONS.md and of `--help`, its flags are read whatever the family is, and the family finds the values
    by `options.section(ItsOptions)` of its `ModelOptions`. Options in helpers/config/options that are declared with
    `some_families=True` are shared: `options` names those that this family reads.
    """

    wrapper: str = ""  # the script that trains it: "./train_sdxl.sh"
    setting: str = ""  # in the env file, where the wrapper trains this family only with it: "PIXART_SIGMA='true'"
    pipelines: tuple[str, ...] = ()  # pipeline classes of diffusers: `_class_name` in the model_index.json of its base models
    accepts: Callable[[Mapping[str, Any]], bool] = every_index  # whether a model_index.json that names one of them is of this family
    selectable: bool = True  # False: not a value of --model_family, but recognized from the base model's files
    section: type | None = None  # the options that this family declares; families in one file may share a section
    options: frozenset[str] = frozenset()  # the shared options that it reads
    model_types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # further values of --model_type => the options they set
    objective: str = "diffusion"  # what its networks predict, by the name in the objectives registry
    switched: Mapping[str, str] = field(default_factory=dict)  # switch of the settings => the objective with it
    zero_snr: bool = False  # base models that predict the velocity are trained with zero terminal SNR, unless the user turns it off
    img2img: bool = False  # validation can start from images
    trains_text_encoders: frozenset[str] = frozenset()  # values of --model_type that can train its text encoders too
    encoders_apart: bool = False  # a caption can be dropped for one text encoder and kept for another
    controlnet: bool = False  # a ControlNet can be trained for its networks
    edge: int | None = None  # the shorter edge in pixels that all its base models are made for
    single_file: SingleFile | None = None  # where diffusers' pipelines do not read its single files
    miniatures: tuple[Miniature, ...] = ()  # one for each variant of the architecture

    def objective_for(self, settings: Settings) -> str:
        """The objective under these settings."""
        return next((objective for switch, objective in self.switched.items() if settings[switch]), self.objective)

    def reads(self, item: Option) -> bool:
        """Whether an option means anything to this family, whatever the other settings are."""
        if item.objective and item.objective not in (self.objective, *self.switched.values()):
            return False
        own = self.section is not None and item.section == self.section.__name__
        return own or item.name in self.options or not item.some_families

    @property
    def command(self) -> str:
        """How a base model of this family is trained. Families with the same command are recognized by their base model."""
        return f"{self.wrapper} with {self.setting}" if self.setting else self.wrapper


def family_problems(family: FamilyFacts, settings: Settings) -> Iterable[str]:
    """What a family refuses: what its networks or pipelines cannot, and by its own rules."""
    if settings["validation_using_datasets"] and not family.img2img:
        yield f"--validation_using_datasets: {family.title} has no image-to-image pipeline. Remove it."
    if settings["train_text_encoder"] and settings["controlnet"]:
        yield "--train_text_encoder cannot be combined with --controlnet, which freezes everything else. Remove one of them."
    elif settings["train_text_encoder"] and settings["model_type"] not in family.trains_text_encoders:
        yield _without_text_encoders(family)
    for name in ("controlnet", "train_text_encoder"):
        if settings[name] and settings["long_captions"] == "chunk":
            yield f"--long_captions=chunk cannot be combined with --{name}, which reads 77 tokens. Remove one of them."
    if settings["pretrained_t5_model_name_or_path"] and "pretrained_t5_model_name_or_path" not in family.options:
        yield f"--pretrained_t5_model_name_or_path is not for {family.title}, whose captions no T5 reads; remove it."
    if settings["controlnet"] and not family.controlnet:
        yield f"--controlnet is not for {family.title}: there is no ControlNet of it to train here. Remove it, or choose another model."
    yield from family.judge(settings)


def size_notes(family: FamilyFacts, resolution_of: Mapping[str, tuple[float, str]]) -> Iterable[str]:
    """One sentence for every dataset that is trained at another size than the family's models are for.

    `resolution_of` holds each one's resolution and its unit, "pixel" or "area", by the set's id.
    """
    for dataset, (resolution, unit) in resolution_of.items():
        edge = resolution if unit == "pixel" else math.sqrt(resolution * 1e6)
        if family.edge and not 1 / SAME_SIZE <= edge / family.edge <= SAME_SIZE:
            yield (
                f"dataset {dataset!r} is trained at {edge:.0f} pixels, and {family.title} generates images of {family.edge}: "
                "leave RESOLUTION empty, and the set without a resolution, for that size."
            )


def with_origin(problem: str, origins: Mapping[str, str]) -> str:
    """A sentence that begins with an option, and before it who set that option, where it was not its own flag."""
    option = re.match(r"--(\w+)", problem)
    origin = origins.get(option[1]) if option else None
    return problem if origin is None or origin == f"--{option[1]}" else f"{origin}: {problem}"  # type: ignore[index]


def _without_text_encoders(family: FamilyFacts) -> str:
    if family.trains_text_encoders:
        kinds = " or ".join(f"--model_type={kind}" for kind in sorted(family.trains_text_encoders))
        return f"--train_text_encoder: the text encoders of {family.title} are trained by {kinds} alone; set that, or remove it."
    return f"--train_text_encoder: the text encoders of {family.title} cannot be trained here. Remove it."
