"""What it is trained on, and what is prepared beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.config.declare import FROM_HERE, ROUNDING, WITH_THE_DATA, option

TABLES = ("parquet", "jsonl", "csv")
CAPTION_STRATEGIES = ("filename", "textfile", "instanceprompt", *TABLES)


@dataclass(frozen=True)
class DataOptions:
    """Data: the dataloader file, and what its data sets fall back to."""

    data_backend_config: Path | None = option(
        None,
        "The dataloader JSON: a list of data sets. Required.",
        env="DATALOADER_CONFIG",
        default_text="required",
        on_resume=WITH_THE_DATA,
    )
    train_batch_size: int = option(4, "Images in a micro-batch, per process.", at_least=1)
    resolution: float = option(1.0, "Size that images are trained at, in the unit of --resolution_type.", above=0, on_resume=WITH_THE_DATA)
    resolution_type: str = option(
        "area",
        "Unit of all sizes: megapixels (area), or length of the shorter side (pixel).",
        choices=("area", "pixel"),
        on_resume=WITH_THE_DATA,
    )
    aspect_bucket_alignment: int | None = option(
        None, "Sides are multiples of this: 64 or 8.", default_text="64; 8 below 0.25 megapixels", on_resume=WITH_THE_DATA
    )
    aspect_bucket_rounding: int | None = option(
        None,
        "Decimals of the aspects in OUTPUT_DIR/aspect_resolution_map-RESOLUTION.json, a file of your own sizes.",
        at_least=1,
        at_most=9,
        default_text="2",
        on_resume=WITH_THE_DATA,
    )
    minimum_image_size: float | None = option(
        None,
        "Leave out smaller images: megapixels, or pixels of the shorter side.",
        env="MINIMUM_RESOLUTION",
        at_least=0,
        on_resume=WITH_THE_DATA,
    )
    maximum_image_size: float | None = option(
        None, "Where crop is on: shrink larger images to --target_downsample_size before the cut.", above=0, on_resume=WITH_THE_DATA
    )
    target_downsample_size: float | None = option(
        None, "What images above --maximum_image_size are shrunk to.", above=0, on_resume=WITH_THE_DATA
    )
    caption_strategy: str = option(
        "filename",
        "Where captions come from: the file's name, the .txt beside it, --instance_prompt, or the data set's table of this kind.",
        env="DEFAULT_CAPTION_STRATEGY",
        choices=CAPTION_STRATEGIES,
        synonyms={"instance_prompt": "instanceprompt"},
        on_resume=WITH_THE_DATA,
    )
    instance_prompt: str | None = option(None, "The caption, or the beginning of it, for every image.", on_resume=WITH_THE_DATA)
    prepend_instance_prompt: bool = option(False, "Put the instance prompt before each caption.", on_resume=WITH_THE_DATA)
    only_instance_prompt: bool = option(False, "Use the instance prompt in place of every caption.", on_resume=WITH_THE_DATA)
    caption_dropout_probability: float = option(
        0.1, "Share of the samples trained without their caption, which guidance needs.", at_least=0, at_most=1
    )
    parquet_caption_column: str = option(
        "description", "Column of captions, in tables of any kind whose entry names none.", on_resume=WITH_THE_DATA
    )
    parquet_filename_column: str = option(
        "id", "Column of file names, in tables of any kind whose entry names none.", on_resume=WITH_THE_DATA
    )
    preserve_data_backend_cache: bool = option(
        False,
        "Take data sets that were listed before to be as they were, and list none again: new and changed files are not noticed.",
        on_resume=FROM_HERE,
    )
    skip_file_discovery: str = option("", "The same, whatever it says; older settings name stages here.", on_resume=FROM_HERE)
    record_samples: bool = option(False, "Write one line for every trained sample to OUTPUT_DIR/samples.jsonl.", on_resume=FROM_HERE)
    accept_changed_data: bool = option(
        False, "Resume although the data changed since the checkpoint; the next epoch is ordered over the new data.", on_resume=FROM_HERE
    )
    aspect_bucket_disable_rebuild: bool = option(
        False, "Keep random aspects for the whole run, also of data sets that are drawn anew each epoch (vae_cache_clear_each_epoch)."
    )


@dataclass(frozen=True)
class CacheOptions:
    """Caches: latents and text embeddings are encoded once, before training."""

    cache_dir: Path = option(None, "Folder of all caches.", default_text="OUTPUT_DIR/cache", on_resume=FROM_HERE)
    cache_dir_vae: Path = option(None, "Latents of data sets that name no folder.", default_text="CACHE_DIR/latents", on_resume=FROM_HERE)
    cache_dir_text: Path = option(
        None,
        "Text embeddings, unless the JSON names a folder.",
        default_text="CACHE_DIR/text",
        needs=(("train_text_encoder", (False,)),),
        on_resume=FROM_HERE,
    )
    cache_dtype: str = option(
        "auto",
        "Number format of cached tensors; auto is fp16, range checked.",
        choices=("auto", "fp16", "bf16", "fp32"),
        on_resume=WITH_THE_DATA,
    )
    latent_sampling: str = option(
        "mean",
        "Latents are the mean of the VAE's distribution, or drawn anew each time (sample, twice the bytes).",
        choices=("mean", "sample"),
    )
    vae_batch_size: int = option(4, "Images that the VAE encodes at once.", at_least=1, on_resume=ROUNDING)
    vae_dtype: str = option(
        "default",
        "Precision of the VAE.",
        choices=("default", "bf16", "fp16", "fp32"),
        default_text="bf16, and fp32 on a CPU",
        on_resume=WITH_THE_DATA,
    )
    vae_cache_preprocess: bool = option(
        True,
        "Encode all latents before the first step; false begins at once and encodes what is missing while training runs.",
        on_resume=FROM_HERE,
    )
    vae_tiling: bool = option(
        False,
        "Pictures larger than the VAE was made for pass through it in overlapping tiles: less memory, slightly other latents.",
        on_resume=WITH_THE_DATA,
    )
    vae_slicing: bool = option(False, "The pictures of a batch pass through the VAE one by one, for less memory.", on_resume=ROUNDING)
