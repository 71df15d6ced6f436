"""What a resumed run may change: every option by itself, with another value than the checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.declare import Option
from helpers.config.resume import Changes, compare, run_settings
from helpers.config.sources import Rank
from helpers.errors import CheckpointError
from tests.config.test_every_option import values_to_try

AXES = known_axes()
Read = Callable[..., Config]


def changes_between(before: Config, now: Config, found_before: Mapping[str, Any] = {}, found: Mapping[str, Any] = {}) -> Changes:
    return compare(run_settings(before, AXES, found_before), run_settings(now, AXES, found), now, AXES, step=7)


def with_effect(config: Config, item: Option) -> Config:
    """The settings with a family and an objective that read the option, and with everything that it needs."""
    family = AXES.readers(item)[0]
    objective = item.objective or family.objective
    values = {"model_family": family.name, **dict(_needed(item))}
    return dataclasses.replace(config.replaced("needed", **values), family_name=family.name, objective_name=objective)


def _needed(item: Option) -> Iterator[tuple[str, Any]]:
    for name, values in item.needs:
        other = AXES.options[name]
        yield name, other.default if other.default in values else next(value for value in other.choices or values if value in values)
        yield from _needed(other)


def can_be_changed(item: Option) -> bool:
    return not (item.alias_of or item.does_nothing or item.name == "model_family")


@pytest.mark.parametrize("name", [item.name for item in AXES.options.values() if can_be_changed(item)])
def test_another_value_is_refused_with_both_or_reported_with_its_sentence(name: str, read: Read) -> None:
    item = AXES.options[name]
    before = with_effect(read(), item)
    assert changes_between(before, before) == Changes()
    others = [item.parse(text) for text in values_to_try(item)]
    others = [value for value in others if value != before.values()[name] and value not in item.choice_aliases]
    assert others
    for value in others:
        now = before.replaced(item.flag, **{name: value})
        now = dataclasses.replace(now, ranks={**now.ranks, name: Rank.FLAG})
        changes = changes_between(before, now)
        allowed, refused = ([said for said in of if said.startswith(f"{name} was ")] for of in (changes.allowed, changes.refused))
        if item.on_resume:
            assert refused == [] and len(allowed) == 1 and allowed[0].endswith(item.on_resume.format(step="7"))
        else:
            assert allowed == [] and len(refused) == 1 and " and is now " in refused[0]
            with pytest.raises(CheckpointError, match=r"checkpoint-7 was saved with other settings: .*Set them back, or choose"):
                changes.refuse("checkpoint-7")


def test_the_family_cannot_change(read: Read) -> None:
    changes = changes_between(read("--model_family=sdxl"), read("--model_family=sd2x"))
    assert "model_family was sdxl and is now sd2x" in changes.refused


def test_values_are_named_as_the_user_writes_them(read: Read) -> None:
    def change(before: str, now: str, **variables: str) -> Changes:
        return changes_between(read(before, **variables), read(now, **variables))

    assert change("--adam_beta1=0.9", "--adam_beta1=0.5").refused == ["adam_beta1 was 0.9 and is now 0.5"]
    assert change("--learning_rate=1e-4", "--learning_rate=5e-5").allowed == ["learning_rate was 0.0001 and is 5e-05 from step 7 on"]
    assert change("--report_to=none", "--report_to=tensorboard").allowed == ["report_to was none and is tensorboard from step 7 on"]
    lora = {"MODEL_TYPE": "lora"}
    assert change("--lora_targets=to_q,to_k", "--lora_targets=to_q", **lora).refused == ["lora_targets was to_q,to_k and is now to_q"]
    assert change("--no-use_dora", "--use_dora", **lora).refused == ["use_dora was false and is now true"]


def test_a_schedule_that_changes_is_named_with_what_belongs_to_it(read: Read) -> None:
    changes = changes_between(read("--lr_scheduler=constant"), read("--lr_scheduler=polynomial", "--learning_rate=1e-4", "--lr_power=2"))
    assert changes.refused == []
    assert "lr_scheduler was constant and is polynomial from step 7 on" in changes.allowed
    assert "lr_power was 0.8 and is 2 from step 7 on" in changes.allowed  # the checkpoint does not have it: compared with its default


def test_another_way_to_write_the_same_setting_is_no_change(read: Read) -> None:
    assert changes_between(read("--optimizer=adamw_bf16"), read("--adam_bfloat16")) == Changes()
    assert changes_between(read(), read("--adam_beta1=0.9")) == Changes()  # what is unset has this value


def test_a_setting_without_effect_may_change(read: Read) -> None:
    assert changes_between(read("--lokr_factor=4"), read("--lokr_factor=8")) == Changes()
    assert changes_between(read(LORA_RANK="4"), read(LORA_RANK="8")) == Changes()  # of a full fine-tune
    assert changes_between(read(SD3_CAPTION_DROPOUT="apart"), read(SD3_CAPTION_DROPOUT="together")) == Changes()  # for SDXL


def test_an_option_that_the_checkpoint_does_not_have_is_compared_with_its_default(read: Read) -> None:
    def compared(now: Config, without: str) -> Changes:
        before = {name: value for name, value in run_settings(read(), AXES, {}).items() if name != without}
        return compare(before, run_settings(now, AXES, {}), now, AXES, step=7)

    assert compared(read("--input_perturbation=0.1"), "input_perturbation").refused == ["input_perturbation was 0 and is now 0.1"]
    assert compared(read("--input_perturbation=0"), "input_perturbation") == Changes()
    assert compared(read(), "adam_beta1") == Changes()  # the default depends on the optimizer, and nobody set it


def test_what_the_base_model_decides_may_not_change(read: Read) -> None:
    changes = changes_between(read(), read(), {"base_model_hash": "a1", "prediction_type": "epsilon"}, {"base_model_hash": "b2"})
    assert changes.refused == ["prediction_type was epsilon and is now none", "base_model_hash was a1 and is now b2"]


def test_a_folder_that_moved_is_named_once(read: Read) -> None:
    assert changes_between(read("--output_dir=a"), read("--output_dir=b")).allowed == ["output_dir was a and is b from step 7 on"]


def test_credentials_are_not_kept(read: Read) -> None:
    secret = run_settings(read("--tracker_project_name=https://me:CANARY@host/model"), AXES, {})
    assert "CANARY" not in str(secret) and "host/model" in str(secret)
