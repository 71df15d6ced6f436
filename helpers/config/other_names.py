"""Names of settings in other trainers, and what they are here, for the message about an unknown flag or key."""

from __future__ import annotations

from collections.abc import Mapping

_KEY = " of a dataset in the dataloader JSON"

# Flags of kohya's sd-scripts, OneTrainer, ai-toolkit and the example scripts of diffusers.
FLAGS: Mapping[str, str] = {
    "batch_size": "--train_batch_size",
    "lr": "--learning_rate",
    "unet_lr": "--learning_rate",
    "network_dim": "--lora_rank",
    "rank": "--lora_rank",
    "network_alpha": "--lora_alpha",
    "network_dropout": "--lora_dropout",
    "network_weights": "--init_lora",
    "network_module": "--model_type=lora",
    "save_every": "--checkpointing_steps",
    "save_every_n_steps": "--checkpointing_steps",
    "save_every_n_epochs": "--checkpointing_steps, which counts steps",
    "max_step_saves_to_keep": "--checkpoints_total_limit",
    "steps": "--max_train_steps",
    "epochs": "--num_train_epochs",
    "max_train_epochs": "--num_train_epochs",
    "optimizer_type": "--optimizer",
    "learning_rate_scheduler": "--lr_scheduler",
    "learning_rate_warmup_steps": "--lr_warmup_steps",
    "lr_scheduler_num_cycles": "--lr_num_cycles",
    "lr_scheduler_power": "--lr_power",
    "scale_lr": "--lr_scale",
    "min_snr_gamma": "--snr_gamma",
    "v_parameterization": "--prediction_type=v_prediction",
    "zero_terminal_snr": "--rescale_betas_zero_snr",
    "sample_every": "--validation_steps",
    "sample_every_n_steps": "--validation_steps",
    "sample_prompts": "--user_prompt_library",
    "sample_sampler": "--validation_noise_scheduler",
    "sample_steps": "--validation_num_inference_steps",
    "guidance_scale": "--validation_guidance",
    "log_with": "--report_to",
    "resume": "--resume_from_checkpoint",
    "caption_dropout_rate": "--caption_dropout_probability",
    "base_model_name": "--pretrained_model_name_or_path",
    "dataset_config": "--data_backend_config",
    "train_data_dir": f'"instance_data_dir"{_KEY}',
    "reg_data_dir": f'"is_regularisation_data"{_KEY}, which has images of the class',
    "class_data_dir": f'"is_regularisation_data"{_KEY}, which has images of the class',
    "prior_loss_weight": f'"loss_weight"{_KEY}',
    "caption_extension": f'"caption_extensions"{_KEY}',
    "shuffle_caption": f'"shuffle_tags"{_KEY}',
    "keep_tokens": f'"keep_tags"{_KEY}',
    "flip_aug": f'"flip"{_KEY}',
    "random_flip": f'"flip"{_KEY}',
}

# Keys of datasets.
KEYS: Mapping[str, str] = {
    "num_repeats": '"repeats", which is one less: num_repeats 10 is repeats 9',
    "image_dir": '"instance_data_dir"',
    "folder_path": '"instance_data_dir"',
    "caption_extension": '"caption_extensions"',
    "caption_ext": '"caption_extensions"',
    "class_tokens": '"instance_prompt"',
    "is_reg": '"is_regularisation_data"',
    "shuffle_caption": '"shuffle_tags"',
    "keep_tokens": '"keep_tags"',
    "flip_aug": '"flip"',
    "flip_x": '"flip"',
    "prior_loss_weight": '"loss_weight"',
    "conditioning_data_dir": '"conditioning_data"',
    "mask_path": '"mask_data"',
    "batch_size": "--train_batch_size",
    "caption_dropout_rate": "--caption_dropout_probability",
}


def from_another_trainer(name: str, table: Mapping[str, str]) -> str:
    """`; in this trainer it is --lora_rank`, or nothing."""
    meant = table.get(name.lower().replace("-", "_"))
    return f"; in this trainer it is {meant}" if meant else ""
