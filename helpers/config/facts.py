"""What a family, a method or an objective says of the settings before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, object]  # option name -> effective value, before the Config is built


def no_objection(settings: Settings) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Facts:
    """One choice on an axis (a family, a method, an objective), as far as it can be told without torch.

    `defaults` replace declared defaults of options the user did not set; `judge` yields one sentence for every setting that
    this choice refuses, naming the option and the remedy. `options` mean something to this choice, and nothing to those that do not
    name them too. `objective` is what a family's networks are asked, by its name in the registry; `switched` are switches
    of the settings after which they are asked something else.
    """

    name: str
    title: str
    defaults: Settings = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    objective: str = "diffusion"
    switched: Mapping[str, str] = field(default_factory=dict)  # switch => objective
    img2img: bool = False  # of a family: its pictures can begin with pictures
    trains_text_encoders: frozenset[str] = frozenset()  # of a family: the values of --model_type that can train them too
    encoders_apart: bool = False  # of a family: one text encoder may be told of a caption and another not
    controlnet: bool = False  # of a family: a ControlNet can be trained beside its networks
    judge: Callable[[Settings], Iterable[str]] = no_objection

    def objective_for(self, settings: Settings) -> str:
        """What a family's networks are asked under these settings."""
        return next((objective for switch, objective in self.switched.items() if settings[switch]), self.objective)


def family_problems(family: Facts, settings: Settings) -> Iterable[str]:
    """What a family refuses: what its networks or pipelines cannot, and by its own rules."""
    if settings["validation_using_datasets"] and not family.img2img:
        yield f"--validation_using_datasets: there is no pipeline of {family.title} that begins with a picture; remove it."
    if settings["train_text_encoder"] and settings["controlnet"]:
        yield "--train_text_encoder goes without --controlnet, beside which everything else stands still; remove one of them."
    elif settings["train_text_encoder"] and settings["model_type"] not in family.trains_text_encoders:
        yield _without_text_encoders(family)
    for name in ("controlnet", "train_text_encoder"):
        if settings[name] and settings["long_captions"] == "chunk":
            yield f"--long_captions=chunk goes without --{name}, which reads 77 tokens; remove one of them."
    if settings["pretrained_t5_model_name_or_path"] and "pretrained_t5_model_name_or_path" not in family.options:
        yield f"--pretrained_t5_model_name_or_path is not for {family.title}, whose captions no T5 reads; remove it."
    if settings["controlnet"] and not family.controlnet:
        yield f"--controlnet is not for {family.title}: there is no ControlNet of it to train here. Remove it, or choose another model."
    yield from family.judge(settings)


def _without_text_encoders(family: Facts) -> str:
    if family.trains_text_encoders:
        kinds = " or ".join(f"--model_type={kind}" for kind in sorted(family.trains_text_encoders))
        return f"--train_text_encoder: the text encoders of {family.title} are trained by {kinds} alone; set that, or remove it."
    return f"--train_text_encoder: what {family.title} is told of captions comes from encoders that are not trained; remove it."
