"""What follows from the choice of an optimizer, and what is refused with a sentence that helps."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.config import Config
from helpers.config.optimizer_rules import highest_rate
from helpers.config.optimizers import parse_optimizer_args
from helpers.config.options import OPTIONS
from helpers.config.sources import from_preset
from helpers.errors import ConfigError

Read = Callable[..., Config]


def problem(read: Read, *flags: str, **variables: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*flags, **variables)
    [sentence] = caught.value.problems
    return sentence


def test_a_rate_that_is_found_is_not_scaled(read: Read) -> None:
    assert "prodigy finds its learning rate by itself" in problem(read, "--lr_scale", "--optimizer=prodigy")
    assert "--lr_scale" in problem(read, "--lr_scale", "--optimizer=adafactor", "--adafactor_relative_step")
    assert read("--lr_scale").schedule.lr_scale


# -- names ------------------------------------------------------------------------------------------------------------------


def test_a_misspelt_optimizer_gets_near_names(read: Read) -> None:
    said = problem(read, "--optimizer=prodigi")
    assert "did you mean prodigy?" in said and "is not one of auto, adamw," in said
    assert said.endswith("write any other by its class, as in torch.optim:RAdam.")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("radam", "torch.optim:RAdam"),
        ("paged_adamw", "bitsandbytes.optim:PagedAdamW"),
        ("StableAdamW", "pytorch_optimizer:StableAdamW"),
        ("schedulefree_radam", "pytorch_optimizer:ScheduleFreeRAdam"),
    ],
)
def test_another_optimizer_is_refused_with_the_class_to_write(name: str, place: str, read: Read) -> None:
    pytest.importorskip(place.partition(".")[0].partition(":")[0])
    assert problem(read, f"--optimizer={name}").endswith(f"; write it by its class: --optimizer={place}.")
    assert read(f"--optimizer={place}").optimizer.optimizer == read(OPTIMIZER=place).optimizer.optimizer == place


def test_only_a_flag_or_the_env_file_may_name_a_class(tmp_path: Path) -> None:
    """A preset is data: it must not be able to run code."""
    (tmp_path / "demo").mkdir()
    for name, problems in (("os:system", 1), ("sgd", 0)):
        (tmp_path / "demo" / "lora.json").write_text(json.dumps({"optimizer": name}))
        source = from_preset(OPTIONS, "lora", tmp_path)
        assert len(source.problems) == problems
        assert ("optimizer" in source.settings) is (problems == 0)


@pytest.mark.parametrize("text", ["os:system()", "a b:C", "../x:C", "torch.optim:", ":Adam", "torch.optim:Adam:x", "optim"])
def test_what_is_no_class_is_refused(text: str, read: Read) -> None:
    assert "is not one of auto," in problem(read, f"--optimizer={text}")


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("adamw8bit", "bitsandbytes"),
        ("paged_adamw8bit", "bitsandbytes"),
        ("prodigy", "prodigyopt"),
        ("schedulefree_adamw", "schedulefree"),
        ("lion", "pytorch-optimizer"),
        ("came", "pytorch-optimizer"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_remedy(
    name: str, library: str, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object() if module == "torch" else None)
    said = problem(read, f"--optimizer={name}", "--report_to=none")
    assert f"--optimizer: {name} needs the library {library}; .venv/bin/pip install -c constraints/pins.txt {library}," in said


# -- learning rates ---------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_estimates_the_rate_has_1_as_its_default_and_a_constant_schedule(read: Read) -> None:
    for flag in ("--optimizer=prodigy", "--use_prodigy_optimizer", "--optimizer=dadaptation"):
        config = read(flag)
        assert (config.schedule.learning_rate, config.schedule.lr_scheduler) == (1.0, "constant")
    assert read("--optimizer=prodigy", "--lr_scheduler=cosine", "--lr_end=0").schedule.lr_scheduler == "cosine"
    assert read().schedule.learning_rate == 1e-5


def test_a_rate_that_cannot_be_a_factor_is_refused(read: Read) -> None:
    said = problem(read, "--optimizer=prodigy", LEARNING_RATE="8e-7")
    assert said.startswith("LEARNING_RATE: 8e-07 is a factor to the learning rate that prodigy finds by itself; say 1 and tune it by")
    assert "1000 is a factor" in problem(read, "--optimizer=prodigy", "--learning_rate=1000")
    said = problem(read, "--optimizer=prodigy", "--model_type=lora", "--train_text_encoder", "--text_encoder_lr=5e-5")
    assert said.startswith("--text_encoder_lr: 5e-05 is a factor to the learning rate that prodigy finds for the text encoders by itself")
    assert "as --dadaptation_learning_rate" in problem(read, "--optimizer=dadaptation", "--dadaptation_learning_rate=1e-4")


def test_a_doubtful_rate_is_said_aloud(read: Read) -> None:
    [note] = read("--optimizer=prodigy", "--learning_rate=0.05").notes
    assert "0.05 of it is far from the usual 1" in note
    [note] = read("--optimizer=adamw", "--learning_rate=1").notes
    assert "1 is a very high learning rate for adamw" in note
    assert read("--optimizer=prodigy", "--learning_rate=1").notes == ()


def test_d_adaptation_takes_its_own_rate_instead_of_the_learning_rate(read: Read) -> None:
    """As in the June 2024 release, whose env files always hold a LEARNING_RATE."""
    config = read("--use_dadapt_optimizer", "--dadaptation_learning_rate=0.5", LEARNING_RATE="8e-7")
    assert config.schedule.learning_rate == 0.5
    assert config.origins["learning_rate"] == "dadaptation_learning_rate, instead of LEARNING_RATE"


def test_one_that_averages_has_no_schedule_and_no_second_average(read: Read) -> None:
    assert read("--optimizer=schedulefree_adamw").schedule.lr_scheduler == "constant_with_warmup"
    [note] = read("--optimizer=schedulefree_adamw", LR_SCHEDULE="cosine").notes
    assert note.startswith("LR_SCHEDULE: schedulefree_adamw averages instead of lowering its learning rate")
    assert "--use_ema: --optimizer=schedulefree_adamw averages the weights itself" in problem(
        read, "--optimizer=schedulefree_adamw", "--use_ema"
    )


def test_what_the_relative_step_of_adafactor_leaves_without_effect_is_said(read: Read) -> None:
    notes = read("--optimizer=adafactor", "--adafactor_relative_step", "--learning_rate=1e-4").notes
    assert notes == ("--learning_rate does nothing while adafactor takes relative steps.",)


@pytest.mark.parametrize("relative", ["--adafactor_relative_step", "--optimizer_args=relative_step=true"])
def test_a_rate_for_text_encoders_is_refused_where_adafactor_sets_its_own(relative: str, read: Read) -> None:
    flags = ("--optimizer=adafactor", "--model_type=lora", "--train_text_encoder")
    assert read(*flags, relative).notes == ()
    assert read(*flags, "--text_encoder_lr=1e-5").notes == ()
    said = problem(read, *flags, relative, "--text_encoder_lr=1e-5")
    assert said.startswith("--text_encoder_lr: adafactor sets its own rate with its relative step")


# -- detail flags and arguments -----------------------------------------------------------------------------------------------


def test_the_highest_rate_is_told_as_what_the_optimizer_makes_of_it() -> None:
    assert highest_rate("adamw", None, False, 3e-3) == "a learning rate of 0.003 at most"
    for name in ("prodigy", "dadaptation"):
        assert highest_rate(name, None, False, 1.0) == f"up to 1 times the learning rate that {name} finds for them"
    relative = "the learning rate that adafactor sets by its relative step"
    assert highest_rate("adafactor", None, True, 1e-3) == highest_rate("adafactor", "relative_step=true", False, 1e-3) == relative
    assert highest_rate("adafactor", "relative_step=false", True, 1e-3) == "a learning rate of 0.001 at most"


def test_adams_settings_have_adams_defaults_and_are_left_to_other_optimizers(read: Read) -> None:
    def settings(*flags: str) -> tuple[object, ...]:
        chosen = read(*flags).optimizer
        return chosen.adam_beta1, chosen.adam_beta2, chosen.adam_weight_decay, chosen.adam_epsilon

    for name in ("auto", "adamw", "adamw_bf16", "schedulefree_adamw"):
        assert settings(f"--optimizer={name}") == (0.9, 0.999, 1e-2, 1e-8)
    assert settings("--optimizer=lion") == (None, None, None, None)
    assert settings("--optimizer=lion", "--adam_beta1=0.8") == (0.8, None, None, None)


def test_adafactor_clips_its_own_updates_unless_it_is_told_to_clip(read: Read) -> None:
    assert read("--optimizer=adafactor").optimizer.max_grad_norm == 0.0
    assert read("--optimizer=adafactor", "--max_grad_norm=1").optimizer.max_grad_norm == 1.0
    assert read().optimizer.max_grad_norm == 2.0


@pytest.mark.parametrize("flag", ["--prodigy_beta3=0.9", "--adafactor_relative_step", "--dadaptation_learning_rate=0.5"])
def test_a_flag_of_another_optimizer_says_that_it_does_nothing(flag: str, read: Read) -> None:
    [note] = read(flag).notes
    assert note == f"{flag.partition('=')[0]} does nothing while optimizer is auto."


def test_adams_flags_that_prodigy_has_its_own_for_say_so(read: Read) -> None:
    [note] = read("--optimizer=prodigy", "--adam_weight_decay=0.1").notes
    assert note.startswith("--adam_weight_decay does nothing while optimizer is prodigy")


def test_arguments_are_read_as_numbers_switches_tuples_and_words() -> None:
    text = "betas=0.9,0.99 eps=1e-6 amsgrad=true rank=4 mode=fast beta3=none  note='two words' both=(1,2)"
    expected = {"betas": (0.9, 0.99), "eps": 1e-6, "amsgrad": True, "rank": 4, "mode": "fast", "beta3": None}
    assert parse_optimizer_args(text) == {**expected, "note": "two words", "both": (1, 2)}
    assert parse_optimizer_args(None) == parse_optimizer_args("") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weight_decay", "'weight_decay' is not of the form key=value"),
        ("a-b=1", "'a-b=1' is not of the form key=value"),
        ("eps=1 eps=2", "eps is given twice"),
        ("name='x", "No closing quotation"),
        ("lr=1e-4", "the learning rate is --learning_rate"),
    ],
)
def test_arguments_that_cannot_be_read_are_refused(text: str, said: str, read: Read) -> None:
    assert said in problem(read, f"--optimizer_args={text}")


def test_a_flag_and_an_argument_for_the_same_thing_contradict_each_other(read: Read) -> None:
    said = problem(read, "--optimizer_args=weight_decay=0.1", "--adam_weight_decay=0.2")
    assert said == "--optimizer_args sets weight_decay, and so does --adam_weight_decay; remove one."
