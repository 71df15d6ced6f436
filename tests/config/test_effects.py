"""Each option and each key of the dataloader JSON that can be used has an effect; it is refused otherwise, or says that it has none."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import pytest

from helpers.choices import known_axes
from helpers.config.datasets import DatasetConfig, TextCacheConfig
from helpers.config.declare import Option, options_of
from helpers.errors import CheckpointError
from tests.config.effects.keys import DATASET_EFFECTS, TEXT_CACHE_EFFECTS
from tests.config.effects.lab import ENTRY, Effect, Lab, build_lab, refusal
from tests.config.effects.options import OPTION_EFFECTS
from tests.config.effects.probes import exported_scheduler
from tests.config.test_every_option import values_to_try

OPTIONS = known_axes().options

KEYS: dict[type, Mapping[str, Effect]] = {DatasetConfig: DATASET_EFFECTS, TextCacheConfig: TEXT_CACHE_EFFECTS}


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return build_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab(built_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(built_lab.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(built_lab.folder / "hub"))
    return built_lab


@pytest.mark.parametrize("name", OPTION_EFFECTS)
def test_an_option_has_its_effect(name: str, lab: Lab) -> None:
    OPTION_EFFECTS[name].check(lab, lambda value: f"--{name}={value}")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, effects in KEYS.items() for name in effects])
def test_a_key_has_its_effect(kind: type, name: str, lab: Lab) -> None:
    [item] = [item for item in options_of(kind) if item.name == name]
    effect = KEYS[kind][name]
    effect.check(lab, lambda value: lab.data(effect.entries(name, item.parse(value))))


def test_the_same_settings_give_the_same_losses(lab: Lab) -> None:
    """Or losses would differ under any two values of an option."""
    assert lab.run_again((), lab.new_folder()).rows("samples.jsonl") == lab.run().rows("samples.jsonl")


BF16 = ("--model_type=full", "--mixed_precision=bf16", "--optimizer=adamw_bf16")


@pytest.mark.parametrize(
    "flags",
    [
        ("--base_quantization=nf4", "--validation_prompt=a cat", "--validation_num_inference_steps=1", "--validation_steps=2"),
        ("--base_quantization=int8", "--lora_algorithm=lokr", "--gradient_checkpointing"),
        ("--model_type=full", "--channels_last", "--unet_attention_slice"),
        (*BF16, "--optimizer_cpu_offload", "--gradient_precision=fp32", "--gradient_accumulation_steps=3", "--attention=math"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_run_in_less_memory_goes_on_as_if_it_had_not_stopped(flags: tuple[str, ...], lab: Lab) -> None:
    whole = lab.run_again((*flags, "--max_train_steps=4"), lab.new_folder())
    folder = lab.new_folder()
    lab.run_again((*flags, "--max_train_steps=2"), folder)
    again = lab.run_again((*flags, "--max_train_steps=4"), folder)
    assert "resuming from checkpoint-2" in again.printed
    assert [row["loss"] for row in again.rows("metrics.jsonl")] == [row["loss"] for row in whole.rows("metrics.jsonl")]


def test_the_exported_pipeline_samples_as_validation_does(lab: Lab) -> None:
    """The second effect of --validation_noise_scheduler."""
    for name, kind in (("euler", "EulerDiscreteScheduler"), ("ddim", "DDIMScheduler")):
        exported = exported_scheduler(lab, ("--model_type=full", f"--validation_noise_scheduler={name}"))
        assert exported["_class_name"] == exported["index"] == kind


def test_stable_diffusion_3_that_is_trained_by_diffusion_is_exported_and_trained_on_as_such(lab: Lab) -> None:
    """Its pipeline samples in diffusers, and as a base model it says what it was trained for."""
    from diffusers import StableDiffusion3Pipeline

    by_diffusion = ("--model_family=sd3", "--sd3_uses_diffusion", "--validation_noise_scheduler=ddim")
    first = ("--model_type=full", "--pretrained_model_name_or_path=sd3", *by_diffusion)
    exported = exported_scheduler(lab, first)
    assert exported["_class_name"] == exported["index"] == "DDIMScheduler"
    assert (exported["prediction_type"], exported["rescale_betas_zero_snr"], exported["clip_sample"]) == ("v_prediction", True, False)
    folder = lab.run(first).folder / "pipeline"
    picture = StableDiffusion3Pipeline.from_pretrained(folder)(
        "a cat", width=64, height=64, num_inference_steps=2, output_type="pt", max_sequence_length=32
    ).images
    assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()
    again = (f"--pretrained_model_name_or_path={folder}", "--max_train_steps=1")
    assert "was trained by diffusion, according to its scheduler: set --sd3_uses_diffusion" in refusal(lab, ("--model_family=sd3", *again))
    assert refusal(lab, (*by_diffusion, *again)) == ""


def test_a_run_does_not_go_on_with_another_t5_unless_that_is_accepted(lab: Lab) -> None:
    folder, of_sd3 = lab.new_folder(), ("--model_family=sd3", "--pretrained_model_name_or_path=sd3")
    lab.run_again((*of_sd3, "--max_train_steps=1"), folder)
    other = (*of_sd3, "--pretrained_t5_model_name_or_path=t5", "--max_train_steps=2")
    with pytest.raises(CheckpointError, match="has changed since checkpoint-1: text_encoders"):
        lab.run_again(other, folder)
    assert "changed since checkpoint-1 and accepted (text_encoders)" in lab.run_again((*other, "--accept_changed_data"), folder).printed


def test_a_run_resumes_with_the_bytes_of_its_base_lora_wherever_they_are(lab: Lab) -> None:
    folder = lab.new_folder()
    lab.run_again(("--base_lora=lora_0.safetensors", "--max_train_steps=1"), folder)
    shutil.copy("lora_0.safetensors", "moved.safetensors")
    lab.run_again(("--base_lora=moved.safetensors", "--max_train_steps=2"), folder)
    for other in ("--base_lora=lora_1.safetensors", "--base_lora=none"):
        with pytest.raises(
            CheckpointError, match="checkpoint-2 was saved with other settings: base_lora was a file of SHA-256 .* and is now"
        ):
            lab.run_again((other, "--max_train_steps=3"), folder)


# -- the table is complete: there is no list of exceptions ------------------------------------------------------------------


def can_be_used(item: Option) -> bool:
    """Whether it is accepted with any other value than its default, and claims that this changes something."""
    if item.not_yet or item.does_nothing:
        return False
    targets = [(item, item.parse(text)) for text in values_to_try(item)]
    if item.alias_of:
        targets = [(OPTIONS[item.alias_of[0]], item.alias_of[1])]
    return any(target.unavailable(value) is None for target, value in targets)


def test_the_table_holds_every_option_that_can_be_used_and_no_other() -> None:
    assert set(OPTION_EFFECTS) == {name for name, item in OPTIONS.items() if can_be_used(item)}


@pytest.mark.parametrize("kind", KEYS)
def test_the_table_holds_every_key_that_can_be_used_and_no_other(kind: type) -> None:
    assert set(KEYS[kind]) == {item.name for item in options_of(kind) if can_be_used(item)}


def test_an_effect_is_looked_for_under_more_than_one_value() -> None:
    effects = {**OPTION_EFFECTS, **DATASET_EFFECTS, **TEXT_CACHE_EFFECTS}
    assert [name for name, effect in effects.items() if len(effect.values) < 2] == []


# -- what has no effect -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, item in OPTIONS.items() if item.does_nothing])
def test_an_option_without_effect_says_so(name: str, lab: Lab) -> None:
    item = OPTIONS[name]
    assert lab.config().notes == ()
    for text in values_to_try(item):
        assert lab.config((f"--{name}={text}",)).notes == (f"--{name} does nothing: {item.does_nothing}.",)


@pytest.mark.parametrize(("kind", "item"), [(kind, item) for kind in KEYS for item in options_of(kind) if item.does_nothing])
def test_a_key_without_effect_says_so(kind: type, item: Option, lab: Lab) -> None:
    for text in values_to_try(item):
        entry = {"id": "text", "dataset_type": "text_embeds"} if kind is TextCacheConfig else dict(ENTRY)
        flag = lab.data([dict(ENTRY) | {"id": "first"}, {**entry, item.name: item.parse(text)}])
        [note] = lab.config((flag,)).notes
        assert note.endswith(f"datasets[1].{item.name} does nothing: {item.does_nothing}.")
