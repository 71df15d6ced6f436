"""Which family a base model belongs to, by the pipeline class in its model_index.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families import family_facts
from helpers.families.loading.folder import model_index
from helpers.families.loading.integrity import remedy
from helpers.families.loading.locate import locate

if TYPE_CHECKING:
    from helpers.config.facts import FamilyFacts
    from helpers.config.options import CacheOptions, ModelOptions


def recognize(asked: str, options: ModelOptions, cache: CacheOptions) -> str:
    """The name of the base model's family in the registry; downloads or converts the model if needed.

    It is `asked`, which the wrapper chose, or another family that the same command trains. Raises ModelError for any other family, with
    the command that trains it.
    """
    families = family_facts()
    if asked not in families or not families[asked].pipelines:
        return asked  # a family without pipelines of diffusers checks its base model itself
    found = locate(options, cache)
    index = model_index(found)
    family = family_of(index)
    if family is not None and family.command == families[asked].command:
        return family.name
    raise _other(found, index, families[asked])


def require_family(found: Path, index: Mapping[str, Any], family: FamilyFacts) -> None:
    """Raises ModelError unless a model folder with this model_index.json belongs to the family."""
    named = family_of(index)
    if named is None or named.name != family.name:
        raise _other(found, index, family)


def family_of(index: Mapping[str, Any]) -> FamilyFacts | None:
    """The family of a model_index.json; None where no family trains its pipeline."""
    pipeline = str(index.get("_class_name"))
    return next((facts for facts in family_facts().values() if pipeline in facts.pipelines and facts.accepts(index)), None)


def _other(found: Path, index: Mapping[str, Any], asked: FamilyFacts) -> ModelError:
    if "_class_name" not in index:
        return ModelError(f"{found / 'model_index.json'} names no pipeline (_class_name): {remedy(found)}.")
    family, pipeline = family_of(index), str(index["_class_name"])
    if family is None:
        return ModelError(f"The base model in {found} has the pipeline {pipeline}, which cannot be trained. Choose one of {asked.title}.")
    if family.command == asked.command:
        advice = "name another base model"
    elif asked.setting and not family.setting:  # the wrapper may be the right one already
        advice = f"train it with {family.command} without {asked.setting}"
    else:
        advice = f"train it with {family.command}"
    return ModelError(f"The base model in {found} is of {family.title} ({pipeline}), not of {asked.title}: {advice}.")
