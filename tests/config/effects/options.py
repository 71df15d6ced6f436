"""What every option that can be used changes, in the order of OPTIONS.md."""

from __future__ import annotations

from helpers.data.base.sample import Size
from tests.config.effects.lab import Effect, cropped, refusal
from tests.config.effects.probes import (
    allows_tf32,
    attention_kernels,
    average,
    average_device,
    base_weights,
    begun,
    buckets,
    cache_clearings,
    cached_dtypes,
    calls,
    channels_last,
    checkpoints,
    compiled_for,
    demo_pictures,
    different_pictures_in_two_runs,
    encodes_behind_training,
    ends,
    ends_on_a_full_disk,
    event_files,
    exported_spacing,
    finds_a_new_picture,
    full_weights_dtype,
    goes_on_with_other_data,
    handed_over,
    has_samples_file,
    images_used,
    kinds_of_pictures,
    launch_arguments,
    lora_modules,
    lora_ranks,
    losses,
    moved_layers,
    new_folders,
    notes,
    of_samples,
    optimizer_or_refusal,
    picture_bytes,
    picture_names,
    picture_steps,
    pictures_of_data,
    prodigys,
    project_of_wandb,
    rates,
    rates_of_a_run,
    resumed_from,
    same_shapes_in_two_epochs,
    samples_of_a_step,
    shown_and_trained,
    size_of_an_image_before_its_cut,
    steps,
    steps_with_copies,
    target_of_an_image,
    timesteps_below,
    trained_roles,
)

FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SPACINGS = ("leading", "linspace", "trailing")
FILENAMES = {f"picture {index}" for index in range(6)}
CAPTIONS = {f"caption number {index}" for index in range(6)}
CONDITIONED = "--data_backend_config=conditioned.json"
CROPPED = "--data_backend_config=cropped.json"
DOG = "--instance_prompt=a dog"
TABLE_COLUMNS = {"description": "left", "other": "other"}
TABLE = ("--data_backend_config=table.json",)

REFINER = "--pretrained_model_name_or_path=refiner"
ALPHA = "--pretrained_model_name_or_path=alpha"
EXPERT = "--refiner_training"
MUCH = "--timestep_bias_multiplier=100000"
HALF = "--timestep_bias_portion=0.5"
SD3_MODEL = "--pretrained_model_name_or_path=sd3"
SD3 = ("--model_family=sd3", SD3_MODEL)
FLUX_MODEL = "--pretrained_model_name_or_path=flux"
MODE = "--weighting_scheme=mode"

LIVE = ("--train_text_encoder", "--text_encoder_limit=100")
LIVE_FULL = (
    *LIVE,
    "--model_family=sd2x",
    "--pretrained_model_name_or_path=sd1",
    "--model_type=full",
    "--freeze_encoder_before=1",
    "--freeze_encoder_after=1",
)

MODEL = {
    "model_family": Effect(refusal, ["sdxl", "sd2x", "sd3"]),
    "sd3": Effect(lambda lab, flags: refusal(lab, flags) == "", {"false": False, "true": True}, (SD3_MODEL,)),
    "sd3_uses_diffusion": Effect(
        lambda lab, flags: refusal(lab, flags) == "", {"false": False, "true": True}, (*SD3, "--validation_noise_scheduler=ddim")
    ),
    "flux": Effect(lambda lab, flags: refusal(lab, flags) == "", {"false": False, "true": True}, (FLUX_MODEL,)),
    "flux_guidance": Effect(losses, ["1", "4"], ("--model_family=flux", FLUX_MODEL)),
    "pretrained_model_name_or_path": Effect(losses, ["model", "other"]),
    "single_file_config": Effect(
        refusal,
        ["sd1", "no/such/folder"],
        ("--model_family=sd2x", "--pretrained_model_name_or_path=sd1.safetensors", "--max_train_steps=1"),
    ),
    "model_type": Effect(handed_over, {"full": {"pipeline"}, "lora": {"pytorch_lora_weights.safetensors"}}),
    "revision": Effect(base_weights, ["main", "second"], ("--pretrained_model_name_or_path=someone/tiny",)),
    "variant": Effect(base_weights, ["bf16", "fp16"], ("--pretrained_model_name_or_path=varied",)),
    "pretrained_vae_model_name_or_path": Effect(losses, ["model", "other"]),
    "pretrained_t5_model_name_or_path": Effect(losses, ["sd3", "t5"], SD3),
    "controlnet": Effect(handed_over, {"false": {"pipeline"}, "true": {"controlnet"}}, ("--model_type=full", CONDITIONED)),
    "controlnet_model_name_or_path": Effect(losses, ["controlnet_0", "controlnet_1"], ("--model_type=full", "--controlnet", CONDITIONED)),
    "freeze_unet_strategy": Effect(losses, ["none", "bitfit"], ("--model_type=full",)),
    "use_bitfit": Effect(losses, ["false", "true"], ("--model_type=full",)),
    "long_captions": Effect(
        losses,
        ["truncate", "chunk"],
        ("--caption_strategy=instanceprompt", f"--instance_prompt={'many words ' * 60}", "--lora_targets=to_k"),
    ),
    "tokenizer_max_length": Effect(losses, ["16", "64"], SD3),
    "pixart_sigma": Effect(refusal, ["false", "true"]),
    "pixart_alpha": Effect(refusal, ["false", "true"]),
    "hunyuan_dit": Effect(refusal, ["false", "true"]),
    "export_single_file": Effect(
        handed_over, {"false": {"pipeline"}, "true": {"pipeline", "pipeline.safetensors"}}, ("--model_type=full",)
    ),
    "data_aesthetic_score": Effect(losses, ["7", "2.5"], (REFINER,)),
}

ADAPTER = {
    "lora_algorithm": Effect(losses, ["lora", "locon", "lokr", "loha"], ("--lora_targets=",)),
    "lora_rank": Effect(lora_ranks, {"1": {1}, "3": {3}}),
    "lora_alpha": Effect(losses, ["1", "16"]),
    "lora_layers": Effect(lora_ranks, {"none": {2}, "layers.json": {2, 5}}),
    "use_rslora": Effect(losses, ["false", "true"]),
    "lora_dropout": Effect(losses, ["0", "0.5"]),
    "lora_init_type": Effect(losses, ["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"], ("--base_quantization=int8",)),
    "lora_targets": Effect(lora_modules, {"to_q": {"to_q"}, "to_k,to_out.0": {"to_k", "to_out"}}),
    "init_lora": Effect(losses, ["none", "lora_0.safetensors", "lora_1.safetensors"]),
    "base_lora": Effect(losses, ["none", "lora_0.safetensors", "lora_1.safetensors"]),
    "use_dora": Effect(losses, ["false", "true"]),
    "lokr_factor": Effect(losses, ["2", "4"], ("--lora_algorithm=lokr",)),
}

TEXT_ENCODER = {
    "train_text_encoder": Effect(trained_roles, {"false": {"unet"}, "true": {"unet", "text_encoder", "text_encoder_2"}}),
    "text_encoder_lr": Effect(losses, ["1e-3", "1e-1"], LIVE),
    "freeze_encoder": Effect(moved_layers, {"false": {-1, 0, 1, "norm"}, "true": {-1, 0, 1}}, LIVE_FULL),
    "freeze_encoder_strategy": Effect(
        moved_layers,
        {"before": {1, "norm"}, "after": {-1, 0, 1}, "between": {-1, 0, "norm"}, "outside": {1}},
        LIVE_FULL,
    ),
    "freeze_encoder_before": Effect(moved_layers, {"0": {0, 1}, "1": {1}}, (*LIVE_FULL, "--freeze_encoder_strategy=outside")),
    "freeze_encoder_after": Effect(moved_layers, {"0": {-1, 0}, "1": {-1, 0, 1}}, LIVE_FULL),
    "text_encoder_limit": Effect(losses, ["1", "100"], ("--train_text_encoder",)),
}

OBJECTIVE = {
    "prediction_type": Effect(losses, ["epsilon", "v_prediction", "sample"]),
    "rescale_betas_zero_snr": Effect(losses, ["false", "true"], ("--prediction_type=v_prediction",)),
    "training_scheduler_timestep_spacing": Effect(exported_spacing, {name: name for name in SPACINGS}, ("--model_type=full",)),
    "inference_scheduler_timestep_spacing": Effect(picture_bytes, SPACINGS),
    "loss": Effect(losses, ["mse", "huber"]),
    "huber_delta": Effect(losses, ["0.1", "1"], ("--loss=huber",)),
    "loss_weighting": Effect(losses, ["none", "min_snr", "soft_min_snr", "debiased"]),
    "snr_gamma": Effect(losses, ["0", "5"]),
    "use_soft_min_snr": Effect(losses, ["false", "true"]),
    "soft_min_snr_sigma_data": Effect(losses, ["1", "0.5"], ("--use_soft_min_snr",)),
    "snr_weight": Effect(losses, ["1", "2"]),
    "offset_noise": Effect(losses, ["false", "true"], ("--noise_offset_probability=1",)),
    "noise_offset": Effect(losses, ["0.1", "0.2"], ("--offset_noise", "--noise_offset_probability=1")),
    "noise_offset_probability": Effect(losses, ["0", "1"], ("--offset_noise",)),
    "input_perturbation": Effect(losses, ["0", "0.1"]),
    "timestep_bias_strategy": Effect(timesteps_below(500), {"none": False, "earlier": True}, (MUCH, HALF)),
    "timestep_bias_multiplier": Effect(timesteps_below(500), {"0.001": False, "1000": True}, ("--timestep_bias_strategy=earlier", HALF)),
    "timestep_bias_portion": Effect(timesteps_below(200), {"0.2": True, "0.9": False}, ("--timestep_bias_strategy=earlier", MUCH)),
    "timestep_bias_begin": Effect(losses, ["0", "500"], ("--timestep_bias_strategy=range", "--timestep_bias_end=600", MUCH)),
    "timestep_bias_end": Effect(timesteps_below(200), {"200": True, "900": False}, ("--timestep_bias_strategy=range", MUCH)),
    "disable_segmented_timestep_sampling": Effect(losses, ["false", "true"]),
    "refiner_training": Effect(timesteps_below(200), {"false": False, "true": True}),
    "refiner_training_strength": Effect(timesteps_below(350), {"0.35": True, "0.9": False}, (EXPERT,)),
    "refiner_training_invert_schedule": Effect(timesteps_below(200), {"false": True, "true": False}, (EXPERT,)),
    "sdxl_refiner_uses_full_range": Effect(timesteps_below(200), {"false": True, "true": False}, (REFINER,)),
    "weighting_scheme": Effect(losses, ["logit_normal", "mode", "cosmap", "uniform"], SD3),
    "logit_mean": Effect(losses, ["0", "1"], SD3),
    "logit_std": Effect(losses, ["1", "0.5"], SD3),
    "mode_scale": Effect(losses, ["1.29", "0.5"], (*SD3, MODE)),
    "flow_shift": Effect(losses, ["1", "2"], SD3),
}

DATA = {
    "data_backend_config": Effect(of_samples("dataset"), {"data.json": {"pictures"}, "other.json": {"second"}}),
    "train_batch_size": Effect(samples_of_a_step, {"1": 1, "2": 2}),
    "resolution": Effect(buckets, {"64": {"96x64": 2, "64x96": 2, "64x64": 2}, "32": {"48x32": 2, "32x48": 2, "32x32": 2}}),
    "resolution_type": Effect(target_of_an_image, ["area", "pixel"], ("--resolution=20",)),
    "aspect_bucket_alignment": Effect(buckets, {"8": {"96x64": 2, "64x96": 2, "64x64": 2}, "64": {"128x64": 2, "64x128": 2, "64x64": 2}}),
    "aspect_bucket_rounding": Effect(
        target_of_an_image,
        {"1": Size(1152, 768), "2": Size(1216, 832)},
        ("--resolution_type=area", "--resolution=1", "--output_dir=mapped"),
    ),
    "minimum_image_size": Effect(images_used, {"64": 6, "65": 2}),
    "maximum_image_size": Effect(
        size_of_an_image_before_its_cut,
        {"1000": Size(150, 100), "2500": Size(96, 64)},
        (CROPPED, "--target_downsample_size=100"),
        cropped,
    ),
    "target_downsample_size": Effect(
        size_of_an_image_before_its_cut,
        {"100": Size(150, 100), "200": Size(300, 200)},
        (CROPPED, "--maximum_image_size=1000"),
        cropped,
    ),
    "caption_strategy": Effect(of_samples("caption"), {"filename": FILENAMES, "textfile": CAPTIONS, "instanceprompt": {"a dog"}}, (DOG,)),
    "instance_prompt": Effect(of_samples("caption"), {"a cat": {"a cat"}, "a dog": {"a dog"}}, ("--caption_strategy=instanceprompt",)),
    "prepend_instance_prompt": Effect(of_samples("caption"), {"false": FILENAMES, "true": {f"a dog {name}" for name in FILENAMES}}, (DOG,)),
    "only_instance_prompt": Effect(of_samples("caption"), {"false": FILENAMES, "true": {"a dog"}}, (DOG,)),
    "caption_dropout_probability": Effect(of_samples("caption"), {"0": FILENAMES, "1": {""}}),
    "sd3_caption_dropout": Effect(losses, ["apart", "together"], (*SD3, "--caption_dropout_probability=0.4")),
    "parquet_caption_column": Effect(
        of_samples("caption"), {name: {f"{said} {index}" for index in range(6)} for name, said in TABLE_COLUMNS.items()}, TABLE
    ),
    "parquet_filename_column": Effect(images_used, {"id": 6, "file": 3}, TABLE),
    "sdxl_original_size": Effect(losses, ["file", "intermediary"]),
    "record_samples": Effect(has_samples_file, {"false": False, "true": True}),
    "accept_changed_data": Effect(goes_on_with_other_data, {"false": False, "true": True}),
}

CACHE = {
    "cache_dir": Effect(new_folders, {"cache_1": {"cache_1"}, "cache_2": {"cache_2"}}),
    "cache_dir_vae": Effect(new_folders, {"latents_1": {"latents_1"}, "latents_2": {"latents_2"}}),
    "cache_dir_text": Effect(new_folders, {"texts_1": {"texts_1"}, "texts_2": {"texts_2"}}),
    "cache_dtype": Effect(cached_dtypes, {"fp16": {"torch.float16"}, "bf16": {"torch.bfloat16"}, "fp32": {"torch.float32"}}),
    "latent_sampling": Effect(losses, ["mean", "sample"]),
    "vae_batch_size": Effect(calls("Encoder", of=lambda arguments: len(arguments[0])), {"1": {1: 6}, "2": {2: 3}}),
    "preserve_data_backend_cache": Effect(finds_a_new_picture, {"false": True, "true": False}, ("--max_train_steps=1",)),
    "skip_file_discovery": Effect(finds_a_new_picture, {"": True, "vae metadata": False}, ("--max_train_steps=1",)),
    "aspect_bucket_disable_rebuild": Effect(
        same_shapes_in_two_epochs,
        {"false": False, "true": True},
        ("--data_backend_config=reshaped.json", "--max_train_steps=14", "--train_batch_size=1"),
    ),
    "vae_cache_preprocess": Effect(encodes_behind_training, {"true": False, "false": True}),
    "vae_tiling": Effect(
        calls("Encoder", of=lambda arguments: max(arguments[0].shape[2:])), {"false": {96: 2, 64: 1}, "true": {64: 7, 48: 2}}
    ),
    "vae_slicing": Effect(calls("Encoder", of=lambda arguments: len(arguments[0])), {"false": {2: 3}, "true": {1: 6}}),
    "vae_dtype": Effect(
        calls("Encoder", of=lambda arguments: str(arguments[0].dtype)), {"fp32": {"torch.float32": 3}, "bf16": {"torch.bfloat16": 3}}
    ),
}

RUN = {
    "output_dir": Effect(new_folders, {"out_1": {"out_1"}, "out_2": {"out_2"}}),
    "demo": Effect(demo_pictures, {"lora": "concept", "photos": "photos"}),
    "seed": Effect(losses, ["1", "2"]),
    "max_train_steps": Effect(steps, {"1": 1, "4": 4}),
    "num_train_epochs": Effect(steps, {"1": 3, "2": 6}, ("--max_train_steps=0",)),
    "disk_full": Effect(ends_on_a_full_disk, {"stop": "stopped", "wait": "finished"}),
    "max_train_seconds": Effect(ends, {"0.001": "stopped", "600": "finished"}),
    "gradient_accumulation_steps": Effect(samples_of_a_step, {"1": 2, "3": 6}),
    "gradient_checkpointing": Effect(calls("BasicTransformerBlock", of=lambda arguments: "calls"), ["false", "true"]),
    "mixed_precision": Effect(
        calls("Attention", of=lambda arguments: arguments[0].dtype),
        ["no", "bf16"],
    ),
    "allow_tf32": Effect(allows_tf32, {"false": {False}, "true": {True}}),
    "accelerator_cache_clear_interval": Effect(cache_clearings, {"1": 3, "2": 1}),
    "attention": Effect(attention_kernels, {"flash": {FLASH}, "math": set()}),
    "unet_attention_slice": Effect(attention_kernels, {"false": {FLASH}, "true": set()}),
    "gradient_precision": Effect(
        losses,
        ["unmodified", "fp32"],
        ("--model_type=full", "--mixed_precision=bf16", "--optimizer=adamw_bf16", "--gradient_accumulation_steps=3"),
    ),
    "channels_last": Effect(calls("Conv2d", of=channels_last), ["false", "true"]),
    "base_quantization": Effect(losses, ["none", "int8", "nf4", "fp8"]),
    "dataset_report": Effect(shown_and_trained, {"false": (True, True), "true": (True, False)}),
}

PRODIGY = ("--optimizer=prodigy", "--learning_rate=1")

OPTIMIZER = {
    "optimizer": Effect(
        full_weights_dtype, {"adamw": {"torch.float32"}, "adamw_bf16": {"torch.bfloat16"}}, ("--model_type=full", "--mixed_precision=bf16")
    ),
    "optimizer_cpu_offload": Effect(steps_with_copies, {"false": False, "true": True}),
    "adam_bfloat16": Effect(optimizer_or_refusal, {"false": "AdamW", "true": "AdamWBF16"}, ("--model_type=full",)),
    "optimizer_args": Effect(losses, ["", "betas=0.5,0.9"]),
    "use_8bit_adam": Effect(optimizer_or_refusal, ["false", "true"]),
    "use_adafactor_optimizer": Effect(optimizer_or_refusal, {"false": "AdamW", "true": "Adafactor"}, ("--model_type=full",)),
    "use_prodigy_optimizer": Effect(optimizer_or_refusal, ["false", "true"], ("--learning_rate=1",)),
    "use_dadapt_optimizer": Effect(optimizer_or_refusal, ["false", "true"]),
    "adam_beta1": Effect(losses, ["0.9", "0.5"]),
    "adam_beta2": Effect(losses, ["0.999", "0.9"]),
    "adam_weight_decay": Effect(losses, ["0", "10"]),
    "adam_epsilon": Effect(losses, ["1e-8", "0.1"]),
    "max_grad_norm": Effect(losses, ["0", "0.001"]),
    "adafactor_relative_step": Effect(
        rates_of_a_run, {"false": [1e-3] * 3, "true": [1e-2] * 3}, ("--optimizer=adafactor", "--learning_rate=1e-3")
    ),
    "prodigy_beta3": Effect(prodigys("beta3"), {"none": None, "0.9": 0.9}, PRODIGY),
    "prodigy_decouple": Effect(prodigys("decouple"), {"false": False, "true": True}, PRODIGY),
    "prodigy_use_bias_correction": Effect(prodigys("use_bias_correction"), {"false": False, "true": True}, PRODIGY),
    "prodigy_safeguard_warmup": Effect(prodigys("safeguard_warmup"), {"false": False, "true": True}, PRODIGY),
    "prodigy_learning_rate": Effect(prodigys("d_coef"), {"0.5": 0.5, "2": 2.0}, PRODIGY),
    "prodigy_weight_decay": Effect(prodigys("weight_decay"), {"0": 0.0, "0.1": 0.1}, PRODIGY),
    "prodigy_epsilon": Effect(prodigys("eps"), {"1e-8": 1e-8, "1e-6": 1e-6}, PRODIGY),
    "dadaptation_learning_rate": Effect(rates, {"1": [1.0] * 20, "0.5": [0.5] * 20}, ("--optimizer=dadaptation",)),
}

SCHEDULE = {
    "learning_rate": Effect(rates_of_a_run, {"1e-3": [1e-3] * 3, "1e-2": [1e-2] * 3}),
    "lr_scale": Effect(
        rates_of_a_run, {"false": [1e-3] * 3, "true": [6e-3] * 3}, ("--learning_rate=1e-3", "--gradient_accumulation_steps=3")
    ),
    "lr_scheduler": Effect(
        rates,
        ["linear", "sine", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        ("--lr_warmup_steps=2", "--lr_num_cycles=2"),
    ),
    "lr_warmup_steps": Effect(rates, ["1", "3"], ("--lr_scheduler=constant_with_warmup",)),
    "lr_num_cycles": Effect(rates, ["1", "2"], ("--lr_scheduler=cosine_with_restarts", "--lr_warmup_steps=0")),
    "lr_power": Effect(rates, ["0.8", "2"], ("--lr_scheduler=polynomial", "--lr_warmup_steps=0")),
    "lr_end": Effect(rates, ["0", "1e-3"], ("--lr_scheduler=linear", "--lr_warmup_steps=0")),
}

EMA = {
    "use_ema": Effect(
        handed_over,
        {
            "false": {"pytorch_lora_weights.safetensors"},
            "true": {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_live.safetensors"},
        },
    ),
    "ema_decay": Effect(average, ["0.01", "0.999"]),
    "ema_device": Effect(average_device, {"cpu": "cpu", "accelerator": "meta"}),
    "ema_cpu_only": Effect(average_device, {"false": "meta", "true": "cpu"}, ("EMA_DEVICE=accelerator",)),
    "ema_update_interval": Effect(average, ["1", "2"]),
}

CHECKPOINTS = {
    "checkpointing_steps": Effect(checkpoints, {"1": {1, 2, 3}, "2": {2, 3}}),
    "checkpointing_start": Effect(checkpoints, {"0": {1, 2, 3}, "2": {2, 3}, "9": {3}}, ("--checkpointing_steps=1",)),
    "checkpoints_total_limit": Effect(checkpoints, {"1": {3}, "2": {2, 3}}, ("--checkpointing_steps=1",)),
    "keep_every": Effect(checkpoints, {"1": {1, 2, 3}, "2": {2, 3}, "9": {3}}, ("--checkpointing_steps=1", "--checkpoints_total_limit=1")),
    "resume_from_checkpoint": Effect(resumed_from, {"latest": "checkpoint-2", "checkpoint-1": "checkpoint-1"}),
}

VALIDATION = {
    "validation_prompt": Effect(picture_bytes, ["a cat", "a dog"]),
    "validation_prompt_library": Effect(lambda lab, flags: len(picture_names(lab, flags)), {"false": 1, "true": 33}),
    "user_prompt_library": Effect(
        picture_names, {"none": {"validation_64x64"}, "prompts.json": {"cat_64x64", "dog_64x64", "validation_64x64"}}
    ),
    "validation_negative_prompt": Effect(picture_bytes, ["", "a dog"]),
    "validation_disable_unconditional": Effect(
        picture_names, {"false": {"unconditional_64x64", "validation_64x64"}, "true": {"validation_64x64"}}
    ),
    "num_validation_images": Effect(picture_names, {"1": {"validation_64x64"}, "2": {"validation_64x64_1", "validation_64x64_2"}}),
    "validation_steps": Effect(picture_steps, {"0": {0, 3}, "1": {0, 1, 2, 3}, "2": {0, 2, 3}}),
    "validation_num_inference_steps": Effect(picture_bytes, ["1", "2"]),
    "validation_resolution": Effect(picture_names, {"64": {"validation_64x64"}, "96x64,32": {"validation_96x64", "validation_32x32"}}),
    "validation_guidance": Effect(picture_bytes, ["3", "7.5"]),
    "validation_guidance_rescale": Effect(picture_bytes, ["0", "0.7"]),
    "validation_noise_scheduler": Effect(picture_bytes, ["ddim", "ddpm", "euler", "euler-a", "unipc"]),
    "validation_seed": Effect(picture_bytes, ["1", "2"]),
    "validation_using_datasets": Effect(kinds_of_pictures, {"false": {"validation"}, "true": {"validation", *begun(4)}}),
    "num_eval_images": Effect(
        kinds_of_pictures, {"1": {"validation", *begun(1)}, "2": {"validation", *begun(2)}}, ("--validation_using_datasets",)
    ),
    "eval_dataset_id": Effect(pictures_of_data, ["pictures", "second"], ("--validation_using_datasets", "--data_backend_config=both.json")),
    "validation_torch_compile": Effect(compiled_for, {"false": [], "true": ["max-autotune"]}),
    "validation_torch_compile_mode": Effect(
        compiled_for, {"default": ["default"], "reduce-overhead": ["reduce-overhead"]}, ("--validation_torch_compile",)
    ),
    "validation_randomize": Effect(different_pictures_in_two_runs, {"false": 1, "true": 2}),
}

WITHOUT_THE_HUB = "does nothing while push_to_hub is off."

REPORTING = {
    "report_to": Effect(event_files, {"none": set(), "tensorboard": {"logs/simpletuner-testing"}}),
    "tracker_project_name": Effect(project_of_wandb, {"one": "one", "two": "two"}),
    "tracker_run_name": Effect(event_files, {"one": {"logs/one"}, "two": {"logs/two"}}, ("--report_to=tensorboard",)),
    "logging_dir": Effect(
        event_files, {"events": {"events/simpletuner-testing"}, "logs": {"logs/simpletuner-testing"}}, ("--report_to=tensorboard",)
    ),
    "push_checkpoints_to_hub": Effect(notes, {"false": (), "true": (f"--push_checkpoints_to_hub {WITHOUT_THE_HUB}",)}),
    "hub_model_id": Effect(notes, {"": (), "me/mine": (f"--hub_model_id {WITHOUT_THE_HUB}",)}),
}

LAUNCH = {
    "training_num_processes": Effect(launch_arguments, ["1", "2", "4"]),
    "training_num_machines": Effect(launch_arguments, ["1", "2"], ("--training_num_processes=2",)),
    "accelerate_extra_args": Effect(launch_arguments, ["", "--gpu_ids 1", "--gpu_ids 2"]),
    "training_dynamo_backend": Effect(launch_arguments, ["no", "inductor"]),
}

OPTION_EFFECTS: dict[str, Effect] = {
    **MODEL,
    **ADAPTER,
    **TEXT_ENCODER,
    **OBJECTIVE,
    **DATA,
    **CACHE,
    **RUN,
    **OPTIMIZER,
    **SCHEDULE,
    **EMA,
    **CHECKPOINTS,
    **VALIDATION,
    **REPORTING,
    **LAUNCH,
}
