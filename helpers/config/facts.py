"""What a family, a method or an objective says of the settings before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, object]  # option name -> effective value, before the Config is built


def no_objection(settings: Settings) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Facts:
    """One choice on an axis (a family, a method, an objective), as far as it can be told without torch.

    `defaults` replace declared defaults of options the user did not set; `judge` yields one sentence for every setting that
    this choice refuses, naming the option and the remedy. `options` mean something to this choice, and nothing to those that do not
    name them too. `objective` is what a family's networks are asked, by its name in the registry; `controlnet` says whether a ControlNet
    can be trained beside them.
    """

    name: str
    title: str
    defaults: Settings = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    objective: str = "diffusion"
    controlnet: bool = False
    judge: Callable[[Settings], Iterable[str]] = no_objection


def refused_by_family(family: Facts, settings: Settings) -> Iterator[str]:
    """One sentence for every setting that a family refuses."""
    if settings["controlnet"] and not family.controlnet:
        yield f"--controlnet is not for {family.title}: there is no ControlNet of it to train here. Remove it, or choose another model."
    yield from family.judge(settings)
