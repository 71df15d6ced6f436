"""Options of datasets and caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.config.declare import FROM_HERE, ROUNDING, WITH_THE_DATA, option

TABLES = ("parquet", "jsonl", "csv")
CAPTION_STRATEGIES = ("filename", "textfile", "json", "instanceprompt", *TABLES)


@dataclass(frozen=True)
class DataOptions:
    """Data: the dataloader file, and defaults for its datasets."""

    data_backend_config: Path | None = option(
        None,
        "The dataloader JSON: a list of datasets. Required.",
        env="DATALOADER_CONFIG",
        default_text="required",
        on_resume=WITH_THE_DATA,
    )
    train_batch_size: int = option(4, "Images in a micro-batch, per process.", at_least=1)
    resolution: float = option(1.0, "Training size of images, in the unit of --resolution_type.", above=0, on_resume=WITH_THE_DATA)
    resolution_type: str = option(
        "area",
        "Unit of all sizes: megapixels (area), or pixels of the shorter side (pixel).",
        choices=("area", "pixel"),
        on_resume=WITH_THE_DATA,
    )
    aspect_bucket_alignment: int | None = option(
        None,
        "Width and height of trained images are multiples of this: 64 or 8.",
        default_text="64; 8 below 0.25 megapixels",
        on_resume=WITH_THE_DATA,
    )
    aspect_bucket_rounding: int | None = option(
        None,
        "Decimals of the aspect ratios in OUTPUT_DIR/aspect_resolution_map-RESOLUTION.json, an optional file with your own sizes.",
        at_least=1,
        at_most=9,
        default_text="2",
        on_resume=WITH_THE_DATA,
    )
    minimum_image_size: float | None = option(
        None,
        "Leave out smaller images, in the unit of --resolution_type.",
        env="MINIMUM_RESOLUTION",
        at_least=0,
        on_resume=WITH_THE_DATA,
    )
    maximum_image_size: float | None = option(
        None, "With crop: downscale larger images to --target_downsample_size before cropping.", above=0, on_resume=WITH_THE_DATA
    )
    target_downsample_size: float | None = option(
        None, "Size to which images above --maximum_image_size are downscaled.", above=0, on_resume=WITH_THE_DATA
    )
    caption_strategy: str = option(
        "filename",
        "Where captions come from: the file's name, the .txt or .json beside it, --instance_prompt, or the dataset's table of this kind.",
        env="DEFAULT_CAPTION_STRATEGY",
        choices=CAPTION_STRATEGIES,
        synonyms={"instance_prompt": "instanceprompt"},
        on_resume=WITH_THE_DATA,
    )
    instance_prompt: str | None = option(None, "The caption of every image, or the beginning of it.", on_resume=WITH_THE_DATA)
    prepend_instance_prompt: bool = option(False, "Put the instance prompt in front of each caption.", on_resume=WITH_THE_DATA)
    only_instance_prompt: bool = option(False, "Use the instance prompt instead of every caption.", on_resume=WITH_THE_DATA)
    caption_dropout_probability: float = option(
        0.1, "Share of the samples that are trained without their caption, for classifier-free guidance.", at_least=0, at_most=1
    )
    parquet_caption_column: str = option(
        "description", "Default caption column of tables (Parquet, JSON lines, CSV).", on_resume=WITH_THE_DATA
    )
    parquet_filename_column: str = option("id", "Default file name column of tables (Parquet, JSON lines, CSV).", on_resume=WITH_THE_DATA)
    preserve_data_backend_cache: bool = option(
        False,
        "Do not list datasets again that were listed before. New and changed files are not noticed.",
        on_resume=FROM_HERE,
    )
    skip_file_discovery: str = option("", "Any value has the same effect; older settings name stages here.", on_resume=FROM_HERE)
    record_samples: bool = option(False, "Write a line for every trained sample to OUTPUT_DIR/samples.jsonl.", on_resume=FROM_HERE)
    accept_changed_data: bool = option(
        False, "Resume although the data has changed since the checkpoint. The next epoch uses the new data.", on_resume=FROM_HERE
    )
    aspect_bucket_disable_rebuild: bool = option(
        False, "Keep random aspect ratios for the whole run, also for datasets with vae_cache_clear_each_epoch."
    )


@dataclass(frozen=True)
class CacheOptions:
    """Caches: latents and text embeddings, which are encoded once, before training."""

    cache_dir: Path = option(None, "Folder for all caches.", default_text="OUTPUT_DIR/cache", on_resume=FROM_HERE)
    cache_dir_vae: Path = option(
        None, "Folder for latents, unless a dataset names its own.", default_text="CACHE_DIR/latents", on_resume=FROM_HERE
    )
    cache_dir_text: Path = option(
        None,
        "Folder for text embeddings, unless the dataloader JSON names one.",
        default_text="CACHE_DIR/text",
        needs=(("train_text_encoder", (False,)),),
        on_resume=FROM_HERE,
    )
    cache_dtype: str = option(
        "auto",
        "Number format of cached tensors; auto is fp16, with a check that the values fit.",
        choices=("auto", "fp16", "bf16", "fp32"),
        on_resume=WITH_THE_DATA,
    )
    latent_sampling: str = option(
        "mean",
        "Train on the mean of the VAE's distribution, or on a new sample from it each time (sample; doubles the size of the cache).",
        choices=("mean", "sample"),
    )
    vae_batch_size: int = option(4, "Images that the VAE encodes at once.", at_least=1, on_resume=ROUNDING)
    vae_dtype: str = option(
        "default",
        "Precision of the VAE.",
        choices=("default", "bf16", "fp16", "fp32"),
        default_text="fp32",
        on_resume=WITH_THE_DATA,
    )
    vae_cache_preprocess: bool = option(
        True,
        "Encode all latents before the first step; false starts training at once, and encodes latents in the background.",
        on_resume=FROM_HERE,
    )
    vae_tiling: bool = option(
        False,
        "Encode and decode large images in overlapping tiles: less VRAM, slightly different latents.",
        on_resume=WITH_THE_DATA,
    )
    vae_slicing: bool = option(False, "Encode and decode the images of a batch one by one: less VRAM.", on_resume=ROUNDING)
