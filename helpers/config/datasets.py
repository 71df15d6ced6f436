"""One data set of the dataloader JSON: every key declared once, with the option it falls back to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers.config.declare import option
from helpers.config.options.data import CAPTION_STRATEGIES, LATER_CAPTION_STRATEGIES

_IN_PLACE = "caches follow changed settings by themselves"
_WORKERS = "workers follow the machine's cores"
_AWS_CHAIN = "as AWS's own tools find it"


@dataclass(frozen=True)
class Entry:
    """Keys of every entry."""

    id: str = option("", "Name of the entry, unique in the file. Required.", default_text="required")
    type: str = option(
        "local",
        "Where it is kept: in a local folder, or in a bucket of an S3-compatible store (aws).",
        choices=("local", "aws", "huggingface", "webdataset"),
        later=("huggingface", "webdataset"),
    )
    dataset_type: str = option(
        "image",
        "What it holds: images to train on, or text embeddings.",
        choices=("image", "text_embeds", "conditioning"),
        later=("conditioning",),
    )
    disabled: bool = option(False, "Leave this entry out.", aliases=("disable",))
    aws_bucket_name: str | None = option(None, "Bucket of an entry of type aws; required there.")
    aws_region_name: str | None = option(None, "Region of the bucket.", default_text="that of the AWS configuration")
    aws_endpoint_url: str | None = option(None, "Address of a store other than AWS: R2, Wasabi, MinIO ...", default_text="AWS")
    aws_access_key_id: str | None = option(
        None, "Access key. Better left out: AWS's own variables, profiles and roles count.", default_text=_AWS_CHAIN, secret=True
    )
    aws_secret_access_key: str | None = option(None, "The secret that belongs to it.", default_text=_AWS_CHAIN, secret=True)
    aws_data_prefix: str | None = option(
        None, "Folder in the bucket: of the images, or of the embeddings, for which it is required.", default_text="the whole bucket"
    )
    cache_local_dir: Path | None = option(
        None, "Folder for the index of a cache in a bucket and copies of its shards.", default_text="CACHE_DIR/s3"
    )
    cache_local_limit_gb: float | None = option(None, "Most gigabytes that these copies take, for each cache.", above=0)
    write_batch_size: int = option(64, "Entries a write.", at_least=1, does_nothing="caches are written in sealed shards")
    preserve_data_backend_cache: bool = option(
        False, "Kept file lists.", aliases=("preserve_data_cache_backend",), does_nothing="scans are incremental"
    )


@dataclass(frozen=True)
class TextCacheConfig(Entry):
    """An entry of type text_embeds: where embeddings of captions are kept."""

    cache_dir: Path = option(None, "Folder of the embeddings.", default_text="--cache_dir_text")
    default: bool = option(False, "Used by data sets that name no text_embeds entry; a single entry is the default.")
    caption_filter_list: str | None = option(None, "List or file of what to remove from captions.", not_yet=True)


@dataclass(frozen=True)
class DatasetConfig(Entry):
    """An entry of type image, with everything it does not say taken from the options."""

    instance_data_dir: Path = option(
        None, "Folder of the images, read recursively and never written to. Required of local ones.", default_text="required"
    )
    cache_dir_vae: Path = option(
        None, "Folder of the latents; where an entry of type aws names it, a prefix in its bucket.", inherits="cache_dir_vae"
    )
    text_embeds: str | None = option(
        None, "id of the text_embeds entry to use.", aliases=("text_embed_cache",), default_text="the default entry"
    )
    resolution: float = option(None, "Size that images are trained at.", above=0, inherits="resolution")
    resolution_type: str = option(None, "Unit of its sizes.", choices=("area", "pixel"), inherits="resolution_type")
    minimum_image_size: float | None = option(None, "Leave out smaller images.", at_least=0, inherits="minimum_image_size")
    maximum_image_size: float | None = option(None, "Shrink larger images before cropping.", at_least=0, not_yet=True)
    target_downsample_size: float | None = option(None, "The size they are shrunk to.", at_least=0, not_yet=True)
    crop: bool = option(False, "Cut images to the target's shape; off keeps as much of each image as its shape allows.")
    crop_style: str = option(
        "random", "Where the cut is.", choices=("random", "corner", "center", "face"), spelt={"centre": "center"}, later=("face",)
    )
    crop_aspect: str = option(
        "square", "Shape of the cut: square, or the image's own.", choices=("square", "preserve", "random"), later=("random",)
    )
    crop_aspect_buckets: tuple[str, ...] = option((), "Shapes to choose from.", not_yet=True)
    flip: bool = option(False, "Mirror each sample left to right with probability 0.5; the cut and the sizes SDXL is told follow.")
    caption_strategy: str = option(
        None,
        "Where captions come from.",
        choices=CAPTION_STRATEGIES,
        spelt={"instance_prompt": "instanceprompt"},
        later=LATER_CAPTION_STRATEGIES,
        inherits="caption_strategy",
    )
    instance_prompt: str | None = option(None, "The caption, or the beginning of it.", inherits="instance_prompt")
    prepend_instance_prompt: bool = option(None, "Put the instance prompt before each caption.", inherits="prepend_instance_prompt")
    only_instance_prompt: bool = option(None, "Use the instance prompt in place of captions.", inherits="only_instance_prompt")
    multiple_captions: bool = option(False, "Each line of the text file is a caption.", not_yet=True)
    shuffle_tags: bool = option(False, "Shuffle the tags of a caption.", not_yet=True)
    keep_tags: int = option(0, "Tags that keep their place.", at_least=0, not_yet=True)
    tag_separator: str = option(",", "What stands between tags.", not_yet=True)
    repeats: int = option(0, "Extra passes: N means N + 1 views of each image in an epoch.", at_least=0)
    probability: float = option(1.0, "Share of this set in the mix.", at_least=0, not_yet=True)
    ignore_epochs: bool = option(False, "Fill without holding the epoch open.", not_yet=True)
    loss_weight: float = option(1.0, "Weight of its samples in the loss.", above=0)
    is_regularisation_data: bool = option(False, "Prior preservation set.", not_yet=True)
    vae_cache_clear_each_epoch: bool = option(False, "Encode anew each epoch.", not_yet=True)
    metadata_backend: str = option("json", "Where sizes come from.", choices=("json", "parquet"), later=("parquet",))
    parquet: dict[str, object] | None = option(None, "Parquet table.", not_yet=True)
    jsonl: dict[str, object] | None = option(None, "JSON lines table.", not_yet=True)
    csv: dict[str, object] | None = option(None, "CSV table.", not_yet=True)
    conditioning_data: str | None = option(None, "id of the conditioning set.", not_yet=True)
    path: str | None = option(None, "Hub data set.", not_yet=True)
    split: str | None = option(None, "Split of the hub data set.", not_yet=True)
    image_column: str | None = option(None, "Its image column.", not_yet=True)
    caption_column: str | None = option(None, "Its caption column.", not_yet=True)
    urls: tuple[str, ...] = option((), "Shards of a webdataset.", not_yet=True)
    disable_validation: bool = option(False, "Take no validation images from it.", does_nothing="none are taken from data sets yet")
    skip_file_discovery: str = option("", "Skipped stages.", does_nothing="a start without changes opens no file")
    scan_for_errors: bool = option(False, "Compared latents with buckets.", does_nothing="every cached entry is verified when it is read")
    vae_cache_scan_behaviour: str = option("recreate", "What the scan did.", choices=("recreate", "sync"), does_nothing=_IN_PLACE)
    metadata_update_interval: int = option(3600, "Seconds between saves.", at_least=1, does_nothing="progress is saved as it is made")
    cache_file_suffix: str | None = option(None, "Suffix of bucket files.", does_nothing="no bucket files are written beside the data")
    delete_problematic_images: bool = option(False, "Deleted broken images.", does_nothing="source images are never deleted")
    delete_unwanted_images: bool = option(False, "Deleted small images.", does_nothing="source images are never deleted")
    max_workers: int = option(32, "Cache workers.", at_least=1, does_nothing=_WORKERS)
    process_queue_size: int = option(64, "Cache queue.", at_least=1, does_nothing=_WORKERS)
    disable_after_epoch_step: int | None = option(None, "Had no effect.", does_nothing="it never did")

    aspect_bucket_alignment: int = 64  # pixels; from the option, or from the resolution where that is unset
    text_cache_dir: Path = Path()  # where the embeddings of its captions are kept ...
    text_entry: TextCacheConfig | None = None  # ... unless this entry of type aws keeps them in a bucket
    latents_prefix: str = ""  # in the bucket of an entry of type aws that names its cache_dir_vae; else latents are in that folder


@dataclass(frozen=True)
class DataConfig:
    """What the dataloader JSON says: enabled entries only."""

    datasets: tuple[DatasetConfig, ...] = ()
    text_caches: tuple[TextCacheConfig, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def alignment(resolution: float, resolution_type: str) -> int:
    """The pixel grid for a data set that names none: 64, or 8 where a square image has under a quarter of a megapixel."""
    megapixels = resolution if resolution_type == "area" else resolution**2 / 1e6
    return 64 if megapixels >= 0.25 else 8


def complete(dataset: DatasetConfig, options: Mapping[str, object]) -> DatasetConfig:
    """Fill in what follows from other values."""
    asked = options["aspect_bucket_alignment"]
    grid = asked if isinstance(asked, int) else alignment(dataset.resolution, dataset.resolution_type)
    return dataclasses.replace(dataset, aspect_bucket_alignment=grid)
