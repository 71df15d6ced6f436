"""Each option, by its flag and by each of its variables: it lands in its field, or it is refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.datasets import JsonCaptionConfig, TableConfig
from helpers.config.declare import Option
from helpers.config.optimizers import OPTIMIZERS
from helpers.config.options.data import TABLES
from helpers.config.rules import TRACKERS
from helpers.errors import ConfigError

OPTIONS = known_axes().options

# Text of a usable value where one cannot be made from the declaration alone.
SAMPLES = {
    "resolution": "0.5",
    "aspect_bucket_alignment": "8",
    "lr_end": "1e-7",
    "optimizer_args": "weight_decay=0.1",
    "validation_resolution": "512,1024x768",
    "resume_from_checkpoint": "checkpoint-20",
    "user_prompt_library": "data.json",
    "write_batch_size": "8",
    "init_lora": "data.json",  # read only where a LoRA is trained
    "lora_layers": "data.json",
    "base_lora": "data.json",
    "freeze_encoder_strategy": "before",
    "eval_dataset_id": "pictures",
}
# Other settings that a value needs beside it.
COMPANIONS = {
    ("pretrained_t5_model_name_or_path", "some text"): ("--model_family=sd3",),
    ("base_lora", "data.json"): ("--model_type=lora",),
    ("controlnet", "true"): ("--data_backend_config=conditioned.json",),
    ("resolution_type", "pixel"): ("--resolution=512",),
    ("maximum_image_size", "0.05"): ("--target_downsample_size=0.05",),
    ("target_downsample_size", "0.05"): ("--maximum_image_size=1",),
    ("lr_scheduler", "polynomial"): ("--learning_rate=1e-4",),
    ("caption_strategy", "instanceprompt"): ("--instance_prompt=a dog",),
    **{("caption_strategy", kind): ("--only_instance_prompt", "--instance_prompt=a dog") for kind in TABLES},  # without a table
    ("prepend_instance_prompt", "true"): ("--instance_prompt=a dog",),
    ("only_instance_prompt", "true"): ("--instance_prompt=a dog",),
    ("training_num_machines", "2"): ("--training_num_processes=2",),
    ("num_train_epochs", "0"): ("--max_train_steps=5",),
    ("sd3_uses_diffusion", "true"): ("--validation_noise_scheduler=ddim",),
    ("train_text_encoder", "true"): ("--model_type=lora",),
    **{("timestep_bias_strategy", part): ("--timestep_bias_multiplier=2",) for part in ("earlier", "later", "range")},
    ("refiner_training_strength", "0.25"): ("--refiner_training",),
    ("refiner_training_invert_schedule", "true"): ("--refiner_training",),
    **{("base_quantization", kind): ("--model_type=lora",) for kind in ("int8", "fp8", "nf4")},
}
SWITCHES = {"use_8bit_adam": "adamw8bit", "use_prodigy_optimizer": "prodigy", "use_dadapt_optimizer": "dadaptation"}
OF_OPTIMIZERS = {name: known.place.partition(":")[0].partition(".")[0] for name, known in OPTIMIZERS.items() if known.package}
LIBRARIES = {
    **OF_OPTIMIZERS,
    **{switch: OF_OPTIMIZERS[name] for switch, name in SWITCHES.items()},
    **{name: module for name, (module, _) in TRACKERS.items()},
    **dict.fromkeys(("lokr", "loha"), "lycoris"),
}


def values_to_try(item: Option) -> Iterator[str]:
    """Texts that stand for something else than the default: every choice, both ways of a switch, a number in range."""
    if item.name in SAMPLES:
        yield SAMPLES[item.name]
    elif item.choices:
        yield from (choice for choice in item.choices if choice != item.default and (choice,) != item.default)
    elif item.kind is bool:
        yield "false" if item.default else "true"
    elif item.kind is int:
        yield str(max(int(item.default or 0), int(item.at_least or 0)) + 1)
    elif item.kind is float:
        highest = item.at_most if item.at_most is not None else 10.0
        yield repr(min(highest, (item.default or item.above or item.at_least or 0) + 0.05))
    else:
        texts: dict[type, str] = {
            str: "some text",
            Path: "some/folder",
            tuple: "one,two",
            TableConfig: "some/table",
            JsonCaptionConfig: "some key",
        }
        yield texts[item.kind]


def read_by(item: Option) -> tuple[str, ...]:
    """The family to ask for, where SDXL does not read the option."""
    asked = known_axes().families["sdxl"]
    readers = [family for family in known_axes().readers(item) if family.selectable]
    return () if asked in readers or not readers or item.alias_of else (f"--model_family={readers[0].name}",)


def check(item: Option, text: str, said_by: str, read: Callable[[], Config]) -> None:
    value = item.parse(text)
    meant = dict(item.meaning(value)) or {item.name: value}
    refused = [name for name, other in meant.items() if OPTIONS[name].unavailable(other)]
    library = LIBRARIES.get(text) or LIBRARIES.get(item.name)
    if refused:
        with pytest.raises(ConfigError) as caught:
            read()
        (problem,) = caught.value.problems
        assert problem.startswith(said_by) or item.alias_of
        assert f"--{refused[0]}" in problem and "is not available yet" in problem
    elif library is not None and importlib.util.find_spec(library) is None:
        with pytest.raises(ConfigError, match=f"^{said_by}: .* needs the library"):
            read()
    else:
        config = read()
        assert {item.name: value, **meant}.items() <= config.values().items()
        assert config.origins[item.name] == said_by
        assert any(note.startswith(f"{said_by} does nothing") for note in config.notes) or not item.does_nothing


TRIED = [name for name in OPTIONS if name not in ("pretrained_model_name_or_path", "data_backend_config", "demo")]  # see test_read.py


@pytest.mark.parametrize("name", TRIED)
def test_a_value_lands_in_its_field_or_is_refused_by_name_as_a_flag_and_as_each_variable(name: str, read: Callable[..., Config]) -> None:
    item = OPTIONS[name]
    for text in values_to_try(item):
        companions = COMPANIONS.get((name, text), ())
        check(item, text, item.flag, lambda: read(*read_by(item), *companions, f"{item.flag}={text}"))  # noqa: B023  # called at once
        for variable in item.variables:
            check(item, text, variable, lambda: read(*read_by(item), *companions, **{variable: text}))  # noqa: B023


def test_every_switch_can_be_set_in_each_way() -> None:
    from helpers.config.sources import from_flags

    def value(name: str, *words: str) -> bool:
        source = from_flags(OPTIONS, words)
        assert source.problems == []
        return bool(source.settings[name].value)

    for name in (name for name, item in OPTIONS.items() if item.kind is bool):
        for words in ((f"--{name}",), (f"--{name}=true",), (f"--{name}", "TRUE"), (f"--{name}=Yes",), (f"--{name}=1",)):
            assert value(name, *words), words
        for words in ((f"--no-{name}",), (f"--{name}=false",), (f"--{name}", "off"), (f"--{name}=0",)):
            assert not value(name, *words), words


def test_every_option_of_the_june_2024_release_is_declared() -> None:
    names = set(JUNE_2024.split())
    assert len(names) == 175
    assert names - OPTIONS.keys() == set()


JUNE_2024 = """
    pretrained_model_name_or_path model_type sd3 sd3_uses_diffusion pixart_sigma pretrained_vae_model_name_or_path
    pretrained_t5_model_name_or_path revision variant non_ema_revision controlnet controlnet_model_name_or_path lora_type
    lora_init_type lora_rank lora_alpha lora_dropout use_dora freeze_unet_strategy unet_attention_slice
    enable_xformers_memory_efficient_attention gradient_checkpointing fully_unload_text_encoder save_text_encoder enable_watermark
    tokenizer_max_length data_aesthetic_score train_text_encoder text_encoder_lr freeze_encoder freeze_encoder_strategy
    freeze_encoder_before freeze_encoder_after text_encoder_limit prediction_type rescale_betas_zero_snr
    training_scheduler_timestep_spacing inference_scheduler_timestep_spacing snr_gamma use_soft_min_snr soft_min_snr_sigma_data
    snr_weight weighting_scheme logit_mean logit_std mode_scale offset_noise noise_offset noise_offset_probability
    timestep_bias_strategy timestep_bias_multiplier timestep_bias_portion timestep_bias_begin timestep_bias_end
    disable_segmented_timestep_sampling refiner_training refiner_training_strength refiner_training_invert_schedule
    sdxl_refiner_uses_full_range caption_dropout_probability data_backend_config override_dataset_config resolution
    resolution_type aspect_bucket_rounding aspect_bucket_alignment minimum_image_size maximum_image_size target_downsample_size
    caption_strategy parquet_caption_column parquet_filename_column instance_prompt prepend_instance_prompt only_instance_prompt
    cache_dir cache_dir_text cache_dir_vae vae_batch_size vae_dtype vae_cache_preprocess vae_cache_scan_behaviour keep_vae_loaded
    write_batch_size skip_file_discovery preserve_data_backend_cache aspect_bucket_disable_rebuild aspect_bucket_worker_count
    enable_multiprocessing metadata_update_interval cache_clear_validation_prompts delete_unwanted_images
    delete_problematic_images train_batch_size print_filenames debug_dataset_loader debug_aspect_buckets print_sampler_statistics
    output_dir seed seed_for_each_device num_train_epochs max_train_steps gradient_accumulation_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint learning_rate lr_scale lr_scheduler lr_warmup_steps lr_num_cycles lr_power
    lr_end adam_bfloat16 i_know_what_i_am_doing use_8bit_adam use_adafactor_optimizer use_prodigy_optimizer use_dadapt_optimizer
    adafactor_relative_step prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup
    prodigy_learning_rate prodigy_weight_decay prodigy_epsilon dadaptation_learning_rate adam_beta1 adam_beta2 adam_weight_decay
    adam_epsilon max_grad_norm set_grads_to_none use_ema ema_decay ema_device ema_cpu_only ema_update_interval ema_foreach_disable
    mixed_precision allow_tf32 accelerator_cache_clear_interval offload_param_path local_rank validation_prompt
    validation_prompt_library user_prompt_library validation_negative_prompt validation_disable_unconditional
    num_validation_images validation_steps validation_num_inference_steps validation_resolution validation_guidance
    validation_guidance_rescale validation_noise_scheduler validation_seed validation_seed_source validation_randomize
    validation_using_datasets num_eval_images eval_dataset_id validation_torch_compile validation_torch_compile_mode
    disable_compel push_to_hub push_checkpoints_to_hub hub_model_id report_to tracker_project_name tracker_run_name logging_dir
    webhook_config
    """
