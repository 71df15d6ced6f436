"""What a resumed run may change: the settings that a checkpoint keeps, and their comparison with the present ones.

Every option that has an effect on the run is kept. An option may not change unless its declaration says what happens when it does
(`on_resume`), so a new option is safe without further thought.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from helpers.config.axes import Axes
from helpers.config.config import Config, on_one_line, plain
from helpers.config.declare import Option, show
from helpers.config.effect import Readers, unmet_need
from helpers.errors import CheckpointError

Settings = Mapping[str, Any]  # option name -> JSON value


def run_settings(config: Config, axes: Axes, found: Settings) -> dict[str, Any]:
    """Every setting with an effect on the run, as a checkpoint keeps it.

    `found` replaces the values of options that were left to the base model (its prediction type), and adds what is no option (a hash of
    its weights).
    """
    values = config.values() | {"model_family": config.family_name}
    readers = Readers(axes, (axes.families[config.family_name],), config.objective_name)
    kept = {item.name: plain(values[item.name]) for item in axes.options.values() if _has_effect(item, values, readers)}
    settings: dict[str, Any] = json.loads(json.dumps({**kept, **found}))  # as it will be read back: tuples become lists
    return settings


def _has_effect(item: Option, values: Settings, readers: Readers) -> bool:
    return not (item.alias_of or item.does_nothing or unmet_need(item, values) or readers.not_for(item))


@dataclass
class Changes:
    """What differs from the checkpoint, one clause or sentence for each setting."""

    refused: list[str] = field(default_factory=list)  # `adam_beta1 was 0.9 and is now 0.5`
    allowed: list[str] = field(default_factory=list)  # `learning_rate was 0.0001 and is 5e-05 from step 100 on`

    def refuse(self, checkpoint: str) -> None:
        """Raise CheckpointError naming every setting that may not change and did."""
        if self.refused:
            raise CheckpointError(
                f"{checkpoint} was saved with other settings: {'; '.join(self.refused)}. "
                "Set them back, or choose another --output_dir for a new run."
            )


def compare(before: Settings, now: Settings, config: Config, axes: Axes, step: int) -> Changes:
    """The settings of a checkpoint of `step` against the present ones.

    An option that the checkpoint does not have, because it is new or had no effect, is compared with its default, and only if the
    user set it: a default may depend on other settings.
    """
    changes = Changes()
    for name, old, new in _pairs(before, now, config, axes):
        item = axes.options.get(name)
        follows = item is not None and item.default is None and new is not None and name not in config.said  # from another setting
        if old == new or (item is not None and item.on_resume and follows):
            continue
        was, present = (on_one_line(show(tuple(value) if isinstance(value, list) else value)) for value in (old, new))
        if item is None or not item.on_resume:
            changes.refused.append(f"{name} was {was} and is now {present}")
        else:
            changes.allowed.append(f"{name} was {was} and is {present}{item.on_resume.format(step=f'{step:,}')}")
    return changes


def _pairs(before: Settings, now: Settings, config: Config, axes: Axes) -> Iterator[tuple[str, Any, Any]]:
    """Name, value then and value now of every setting that has an effect now and is comparable."""
    facts = (axes.families[config.family_name], axes.methods[config.method_name], axes.objectives[config.objective_name])
    preferred = {name: value for choice in facts for name, value in choice.defaults.items()}
    for name, new in now.items():
        if name in before:
            yield name, before[name], new
        elif name in config.said and name in axes.options:
            default = preferred.get(name, axes.options[name].default)
            yield name, json.loads(json.dumps(plain(default))), new
