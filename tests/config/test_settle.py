from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.config import Config

Read = Callable[..., Config]
Refuse = Callable[..., str]


def test_steps_and_epochs_of_equal_weight_contradict_each_other(read: Read, refuse: Refuse) -> None:
    assert "both say when training ends" in refuse("--max_train_steps=5", "--num_train_epochs=2")
    assert "both say when training ends" in refuse(MAX_NUM_STEPS="5", NUM_EPOCHS="2")
    assert "both 0" in refuse("--max_train_steps=0", "--num_train_epochs=0")


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        ((), {}, (None, 1)),
        (("--max_train_steps=5",), {}, (5, 0)),
        (("--num_train_epochs=3",), {}, (None, 3)),
        ((), {"MAX_NUM_STEPS": "5", "NUM_EPOCHS": "0"}, (5, 0)),
        ((), {"MAX_NUM_STEPS": "0", "NUM_EPOCHS": "3"}, (None, 3)),
        (("--num_train_epochs=3",), {"MAX_NUM_STEPS": "5"}, (None, 3)),
        (("--max_train_steps=5",), {"NUM_EPOCHS": "3"}, (5, 0)),
        (("--num_train_epochs=0",), {"MAX_NUM_STEPS": "5"}, (5, 0)),
    ],
)
def test_one_of_steps_and_epochs_says_how_long(
    flags: tuple[str, ...], variables: dict[str, str], expected: tuple[int | None, int], read: Read
) -> None:
    run = read(*flags, **variables).run
    assert (run.max_train_steps, run.num_train_epochs) == expected


def test_gamma_and_min_snr_imply_each_other(read: Read, refuse: Refuse) -> None:
    assert read("--snr_gamma=3").objective.loss_weighting == "min_snr"
    assert read("--loss_weighting=min_snr").objective.snr_gamma == 5
    assert read(MIN_SNR_GAMMA="0").objective.snr_gamma is None
    assert read("--loss_weighting=none", MIN_SNR_GAMMA="5").objective.loss_weighting == "none"
    assert "remove one" in refuse("--loss_weighting=none", "--snr_gamma=5")
    assert "remove one" in refuse("--loss_weighting=debiased", "--snr_gamma=5")
    assert "remove one" in refuse("--loss_weighting=min_snr", "--snr_gamma=0")


def test_soft_min_snr_has_a_gamma_or_the_deviation_of_the_data(read: Read, refuse: Refuse) -> None:
    assert read("--use_soft_min_snr").objective.snr_gamma == 5
    assert read("--use_soft_min_snr", "--snr_gamma=3").objective.snr_gamma == 3
    config = read("--loss_weighting=soft_min_snr", "--soft_min_snr_sigma_data=0.5")
    assert (config.objective.loss_weighting, config.objective.snr_gamma) == ("soft_min_snr", 4)
    assert read("--use_soft_min_snr", "--snr_gamma=4", "--soft_min_snr_sigma_data=0.5").objective.snr_gamma == 4
    assert "--soft_min_snr_sigma_data means snr_gamma=4.0, but --snr_gamma says 5.0; remove one" in refuse(
        "--use_soft_min_snr", "--snr_gamma=5", "--soft_min_snr_sigma_data=0.5"
    )
    assert "remove one" in refuse("--use_soft_min_snr", "--snr_gamma=0")
    [note] = read("--soft_min_snr_sigma_data=0.5").notes
    assert note == "--soft_min_snr_sigma_data does nothing while loss_weighting is none."


def test_an_alias_of_an_optimiser_sets_it_unless_something_stronger_says_otherwise(read: Read, refuse: Refuse) -> None:
    config = read("--adam_bfloat16")
    assert (config.optimizer.optimizer, config.origins["optimizer"]) == ("adamw_bf16", "--adam_bfloat16")
    assert read("--optimizer=adamw", ADAM_BFLOAT16="true").optimizer.optimizer == "adamw"
    assert read("--adam_bfloat16", OPTIMIZER="adamw").optimizer.optimizer == "adamw_bf16"
    assert "--adam_bfloat16 means optimizer=adamw_bf16, but --optimizer says adamw" in refuse("--adam_bfloat16", "--optimizer=adamw")


def test_caches_live_under_the_output_folder_unless_named(read: Read) -> None:
    cache = read("--output_dir=out").cache
    assert (cache.cache_dir, cache.cache_dir_vae, cache.cache_dir_text) == (
        Path("out/cache"),
        Path("out/cache/latents"),
        Path("out/cache/text"),
    )
    cache = read("--cache_dir=fast", "--cache_dir_text=text").cache
    assert (cache.cache_dir_vae, cache.cache_dir_text) == (Path("fast/latents"), Path("text"))


def test_resuming_is_the_default_and_can_be_turned_off(read: Read) -> None:
    assert read().checkpoints.resume_from_checkpoint == "latest"
    assert read(RESUME_CHECKPOINT="none").checkpoints.resume_from_checkpoint is None
    assert read("--resume_from_checkpoint=").checkpoints.resume_from_checkpoint is None


def test_older_spellings_of_choices_are_understood(read: Read) -> None:
    config = read("--caption_strategy=instance_prompt", "--instance_prompt=x", "--optimizer=adamw_stochastic", "--no-use_ema")
    assert config.data.caption_strategy == config.datasets[0].caption_strategy == "instanceprompt"
    assert config.optimizer.optimizer == "adamw_bf16"


def test_the_name_of_no_vae_is_the_models_own(read: Read) -> None:
    assert read("--pretrained_vae_model_name_or_path=''").model.pretrained_vae_model_name_or_path is None
    assert read('--pretrained_vae_model_name_or_path=""').model.pretrained_vae_model_name_or_path is None


def test_settings_without_effect_are_said_aloud(read: Read) -> None:
    config = read("--delete_problematic_images", "--noise_offset=0.2", "--ema_decay=0.9", PUSH_CHECKPOINTS="true", LORA_RANK="4")
    assert set(config.notes) == {
        "--delete_problematic_images does nothing: source images are never deleted.",
        "--noise_offset does nothing while offset_noise is off.",
        "--ema_decay does nothing while use_ema is off.",
        "PUSH_CHECKPOINTS does nothing while push_to_hub is off.",
        "LORA_RANK does nothing while model_type is full.",
    }
    assert read("--offset_noise", "--noise_offset=0.2").notes == ()
    assert read("--lr_scheduler=constant", "--lr_warmup_steps=9").notes == (
        "--lr_warmup_steps does nothing while lr_scheduler is constant.",
    )
    assert read("--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=9").notes == ()


def test_a_switch_that_is_turned_off_without_effect_is_said_too(read: Read) -> None:
    assert read("--freeze_encoder=false").notes == ("--freeze_encoder does nothing while train_text_encoder is off.",)
    assert read("--freeze_encoder=false", "--train_text_encoder", "--model_family=sd2x").notes == ()


def test_where_on_the_hub_a_local_base_model_would_be_is_said_to_do_nothing(read: Read, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model.safetensors").touch()
    elsewhere = ("--revision=main", "--single_file_config=someone/model")
    revision = "--revision does nothing: the base model is on this machine, and not on the hub."
    single = "--single_file_config does nothing: the base model is a folder, and no single file."
    assert read(*elsewhere, f"--pretrained_model_name_or_path={tmp_path / 'model'}").notes == (revision, single)
    assert read(*elsewhere, f"--pretrained_model_name_or_path={tmp_path / 'model.safetensors'}").notes == (revision,)
    assert read(*elsewhere, "--pretrained_model_name_or_path=someone/model").notes == ()


@pytest.mark.parametrize(("model_type", "rate"), [("full", 1e-5), ("lora", 1e-4)])
def test_a_run_with_bare_defaults_has_a_learning_rate_that_teaches(model_type: str, rate: float, read: Read) -> None:
    schedule = read(f"--model_type={model_type}").schedule
    assert (schedule.learning_rate, schedule.lr_scheduler, schedule.lr_warmup_steps) == (rate, "constant_with_warmup", None)
