"""Options of the June 2024 release that are accepted and do nothing here."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.config.declare import option

_KEEPS_DATA = "source images are never deleted"
_COMPUTED_ORDER = "order and randomness are computed from the seed, and never depend on the process"


@dataclass(frozen=True)
class IgnoredOptions:
    """Without effect: options of older releases, accepted so that old settings still work. The run lists them in one line."""

    i_know_what_i_am_doing: bool = option(False, "Permitted other optimizers.", does_nothing="every optimizer is permitted")
    delete_unwanted_images: bool = option(False, "Deleted small images.", env="DELETE_SMALL_IMAGES", does_nothing=_KEEPS_DATA)
    delete_problematic_images: bool = option(False, "Deleted broken images.", env="DELETE_ERRORED_IMAGES", does_nothing=_KEEPS_DATA)
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Attention by xformers.", env="USE_XFORMERS", does_nothing="PyTorch's own attention needs as little VRAM; see --attention"
    )
    non_ema_revision: str | None = option(None, "Had no effect.", does_nothing="it never had an effect")
    lora_type: str = option("Standard", "Kind of LoRA.", choices=("Standard",), does_nothing="it never had an effect")
    fully_unload_text_encoder: bool = option(
        False, "Dropped the text encoder.", does_nothing="text encoders are always unloaded after caching"
    )
    save_text_encoder: bool = option(False, "Exported the text encoder.", does_nothing="an exported pipeline is always complete")
    override_dataset_config: bool = option(
        False,
        "Accepted a changed dataset.",
        env="OVERRIDE_DATALOADER_CONFIG",
        does_nothing="caches are updated after changes; see --accept_changed_data",
    )
    vae_cache_scan_behaviour: str = option(
        "recreate", "What a scan did.", choices=("recreate", "sync"), does_nothing="every cached entry is verified when it is read"
    )
    keep_vae_loaded: bool = option(False, "Kept the VAE in memory.", does_nothing="the VAE is loaded when something needs it")
    write_batch_size: int = option(64, "Latents per write.", at_least=1, does_nothing="latents are written in shards")
    aspect_bucket_worker_count: int = option(
        12, "Bucketing workers.", at_least=1, does_nothing="the number of workers depends on the machine's cores"
    )
    enable_multiprocessing: bool = option(
        False, "Processes for bucketing.", does_nothing="the number of workers depends on the machine's cores"
    )
    metadata_update_interval: int = option(3600, "Seconds between saves.", at_least=1, does_nothing="progress is saved at once")
    cache_clear_validation_prompts: bool = option(
        False, "Encoded validation prompts again.", does_nothing="a prompt is encoded again when it or the text encoder changes"
    )
    print_filenames: bool = option(False, "Had no effect.", does_nothing="see --record_samples")
    debug_dataset_loader: bool = option(False, "Had no effect.", does_nothing="see SIMPLETUNER_LOG_LEVEL")
    debug_aspect_buckets: bool = option(False, "Logged the sampler.", does_nothing="see --record_samples")
    print_sampler_statistics: bool = option(False, "Printed sampler state.", does_nothing="see OUTPUT_DIR/dataset_report.json")
    seed_for_each_device: bool = option(True, "Added the rank to the seed.", does_nothing=_COMPUTED_ORDER)
    set_grads_to_none: bool = option(False, "How gradients are cleared.", does_nothing="gradients are always set to None")
    ema_foreach_disable: bool = option(True, "Plain EMA loop.", does_nothing="the result is the same")
    local_rank: int = option(-1, "Rank of this process.", env=(), does_nothing="the launcher sets the rank")
    disable_compel: bool = option(False, "No prompt weighting.", does_nothing="prompts are used as they are written")
