"""One dataset of the dataloader JSON: every key, declared once, with the option that is its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config.aspects import DEFAULT_ROUNDING, AspectBucket, BucketSize, aspect_bucket
from helpers.config.declare import option
from helpers.config.options.data import CAPTION_STRATEGIES, TABLES

_IN_PLACE = "caches follow changed settings by themselves"
_WORKERS = "workers follow the machine's cores"
ALPHA = "alpha"  # as mask_data: the mask is the image's own alpha channel
_AWS_CHAIN = "as AWS's own tools find it"


@dataclass(frozen=True)
class Entry:
    """Keys of every entry."""

    id: str = option("", "Name of the entry, unique in the file. Required.", default_text="required")
    type: str = option(
        "local",
        "Where it is kept: a local folder, a bucket of an S3-compatible store (aws), a Hugging Face dataset, or webdataset tars.",
        choices=("local", "aws", "huggingface", "webdataset"),
    )
    dataset_type: str = option(
        "image",
        "What it contains: images to train on, text embeddings, conditioning images for a ControlNet, or loss masks.",
        choices=("image", "text_embeds", "conditioning", "mask"),
    )
    disabled: bool = option(False, "Leave this entry out.", aliases=("disable",))
    aws_bucket_name: str | None = option(None, "Bucket of an entry of type aws; required there.")
    aws_region_name: str | None = option(None, "Region of the bucket.", default_text="that of the AWS configuration")
    aws_endpoint_url: str | None = option(None, "Address of a store other than AWS: R2, Wasabi, MinIO ...", default_text="AWS")
    aws_access_key_id: str | None = option(
        None, "Access key. Better left out: AWS's own variables, profiles and roles count.", default_text=_AWS_CHAIN, secret=True
    )
    aws_secret_access_key: str | None = option(None, "Secret access key.", default_text=_AWS_CHAIN, secret=True)
    aws_data_prefix: str | None = option(
        None, "Folder in the bucket: of the images, or of the embeddings, for which it is required.", default_text="the whole bucket"
    )
    cache_local_dir: Path | None = option(
        None, "Folder for the index of a cache in a bucket and copies of its shards.", default_text="CACHE_DIR/s3"
    )
    cache_local_limit_gb: float | None = option(None, "Most gigabytes that these copies take, for each cache.", above=0)
    write_batch_size: int = option(64, "Entries per write.", at_least=1, does_nothing="caches are written in sealed shards")


@dataclass(frozen=True)
class TextCacheConfig(Entry):
    """An entry of type text_embeds: where embeddings of captions are kept."""

    cache_dir: Path = option(None, "Folder of the embeddings.", default_text="--cache_dir_text")
    default: bool = option(False, "Used by datasets that name no text_embeds entry; a single entry is the default.")
    caption_filter_list: tuple[str, ...] = option(
        (), "What to remove from or replace in captions: a list of lines, or the path of a .json or .txt file that holds them."
    )
    preserve_data_backend_cache: bool = option(
        False, "Kept file lists.", aliases=("preserve_data_cache_backend",), does_nothing="embeddings are looked up, not listed"
    )


@dataclass(frozen=True)
class TableConfig:
    """The keys of `parquet`, `jsonl` and `csv`: a table of captions and sizes. Only the columns that are needed must be there."""

    path: str = option(
        "", "The table: a path inside the dataset's folder, or from the root of this machine. Required.", default_text="required"
    )
    filename_column: str = option(None, "Column of file names.", inherits="parquet_filename_column")
    identifier_includes_extension: bool | None = option(
        None, "Whether the names in that column end as the files' do; unset, either is found.", default_text="either"
    )
    caption_column: str = option(None, "Captions.", inherits="parquet_caption_column")
    fallback_caption_column: str | None = option(None, "Captions where that column is empty.")
    width_column: str = option("width", "Width in pixels of the image as it is shown.")
    height_column: str = option("height", "Height in pixels of the image as it is shown.")
    aspect_ratio_column: str | None = option(None, "Aspect ratios.", does_nothing="they follow from width and height")
    luminance_column: str | None = option(None, "Luminance.", does_nothing="nothing is chosen by it")


@dataclass(frozen=True)
class JsonCaptionConfig:
    """The keys of `json`: the JSON file beside each image that holds its caption."""

    caption_key: str = option("caption", "Key of the caption in the file's object: a text, or with multiple_captions a list of texts.")


def caption_extension(raw: Any) -> str:
    """An element of `caption_extensions` in lower case, with its dot. ValueError for what is not the end of a file name."""
    if not isinstance(raw, str) or not raw.strip(" .") or "/" in raw:
        raise ValueError(f'is {raw!r}; it must be the end of a file name, such as ".caption"')
    return "." + raw.strip().lstrip(".").lower()


@dataclass(frozen=True)
class DatasetConfig(Entry):
    """An entry of type image, with everything it does not say taken from the options."""

    instance_data_dir: Path = option(
        None, "Folder of the images, read recursively and never written to. Required.", default_text="required", of_type="local"
    )
    cache_dir_vae: Path = option(
        None, "Folder of the latents; where an entry of type aws names it, a prefix in its bucket.", inherits="cache_dir_vae"
    )
    text_embeds: str | None = option(
        None, "id of the text_embeds entry to use.", aliases=("text_embed_cache",), default_text="the default entry"
    )
    layout: str | None = option(
        None,
        "What the names of folders say. kohya: in `10_sks dog`, each image is used 10 times an epoch, and images without a caption get"
        " `sks dog`. plain: nothing.",
        choices=("kohya", "plain"),
        default_text="plain",
        of_type="local",
    )
    resolution: float = option(
        None,
        "Training size of images. With resolution_type pixel also a list of sizes: each image once an epoch at each size that it has.",
        above=0,
        inherits="resolution",
    )
    resolution_type: str = option(None, "Unit of its sizes.", choices=("area", "pixel"), inherits="resolution_type")
    minimum_image_size: float | None = option(None, "Leave out smaller images.", at_least=0, inherits="minimum_image_size")
    maximum_image_size: float | None = option(
        None, "Downscale larger images to target_downsample_size before cropping.", above=0, inherits="maximum_image_size"
    )
    target_downsample_size: float | None = option(
        None, "Size to which images above maximum_image_size are downscaled.", above=0, inherits="target_downsample_size"
    )
    minimum_aspect: float | None = option(None, "Leave out images whose width / height is smaller, such as 0.5.", above=0)
    maximum_aspect: float | None = option(None, "Leave out images whose width / height is larger, such as 2.", above=0)
    crop: bool = option(False, "Crop images to the aspect ratio of crop_aspect; off keeps as much of each image as its bucket allows.")
    crop_style: str = option(
        "random",
        "Position of the crop: random, bottom right, center, or around the largest face.",
        choices=("random", "corner", "center", "face"),
        synonyms={"centre": "center"},
    )
    crop_aspect: str = option(
        "square",
        "Aspect ratio of the crop: square, the image's own, or random from crop_aspect_buckets.",
        choices=("square", "preserve", "random"),
    )
    crop_aspect_buckets: tuple[AspectBucket, ...] = option(
        (),
        'Aspect ratios to choose from, as width / height: 1.5, or {"aspect": 1.5, "weight": 2}; weights are relative.',
        each=aspect_bucket,
    )
    flip: bool = option(False, "Mirror each sample left to right with probability 0.5; the crop coordinates that the network gets follow.")
    caption_strategy: str = option(
        None,
        "Where captions come from.",
        choices=CAPTION_STRATEGIES,
        synonyms={"instance_prompt": "instanceprompt"},
        inherits="caption_strategy",
    )
    instance_prompt: str | None = option(None, "The caption, or the beginning of it.", inherits="instance_prompt")
    prepend_instance_prompt: bool = option(None, "Put the instance prompt in front of each caption.", inherits="prepend_instance_prompt")
    only_instance_prompt: bool = option(None, "Use the instance prompt instead of captions.", inherits="only_instance_prompt")
    caption_extensions: tuple[str, ...] = option(
        (),
        "Endings of the caption files beside the images, in any letter case. Where an image has several, the first in the list counts.",
        default_text='`[".txt"]`',
        each=caption_extension,
    )
    caption_folder: Path | None = option(
        None,
        "Folder of the caption files, with the same names and subfolders as the images. Those beside the images are then not read.",
        default_text="beside the images",
        of_type="local",
    )
    json: JsonCaptionConfig | None = option(None, "With caption_strategy json: where the caption is in the JSON file beside each image.")
    multiple_captions: bool = option(
        False, "Each line of a text, or each element of a table's list, is a caption of its own; one is drawn for each appearance."
    )
    shuffle_tags: bool = option(False, "Put the tags of a caption in another order, one of eight drawn for each caption.")
    keep_tags: int = option(0, "That many tags stay first when tags are shuffled.", at_least=0)
    tag_separator: str = option(",", "Separator between tags.")
    repeats: int = option(0, "Extra passes: N means N + 1 views of each image in an epoch.", at_least=0)
    probability: float | None = option(
        None,
        "Chance that the next micro-batch is of this set, relative to the other sets', until one of them is used up; the rest of the"
        " epoch is even. Where no set has one, the whole epoch is even.",
        at_least=0,
        default_text="1, or by size where no set has one",
    )
    ignore_epochs: bool = option(
        False, "An epoch does not wait for this set: it keeps its probability, goes on in the next epoch, and begins again when used up."
    )
    loss_weight: float = option(1.0, "Weight of its samples in the loss.", above=0)
    is_regularisation_data: bool = option(
        False,
        "It is there to keep what the model can do, and counts by its loss_weight: a run needs another set to learn from. Where no set has"
        " a probability or ignore_epochs, such sets are drawn as often as the others, however many images they have.",
    )
    metadata_backend: str = option("json", "Where sizes come from: the images themselves (json), or a table.", choices=("json", *TABLES))
    parquet: TableConfig | None = option(None, "Parquet table of captions or sizes.")
    jsonl: TableConfig | None = option(None, "The same as JSON lines.")
    csv: TableConfig | None = option(None, "The same as comma-separated values.")
    vae_cache_clear_each_epoch: bool = option(
        False, "Choose new random crops and mirroring for each epoch, and encode them during the epoch before."
    )
    conditioning_data: str | None = option(
        None, "With --controlnet: id of the entry of dataset_type conditioning with a conditioning image of the same name for each image."
    )
    mask_data: str | None = option(
        None,
        "id of the entry of dataset_type mask with a loss mask of the same name for each image; or alpha, for the images' own alpha"
        " channels. White is trained.",
    )
    mask_outside_weight: float = option(0.0, "Loss weight of black areas of the mask; white has 1.", at_least=0, at_most=1)
    resize_filter: str = option(
        "lanczos",
        "In a conditioning set, how its images are resized: smoothly, or so that no new colors arise (nearest), for maps of labels.",
        choices=("lanczos", "nearest"),
    )
    path: str | None = option(
        None,
        "Folder or file of a Hugging Face dataset, or its id where the hub's cache holds it. Required.",
        default_text="required",
        of_type="huggingface",
    )
    split: str | None = option(None, "Split of the Hugging Face dataset.", default_text="the only one, or `train`", of_type="huggingface")
    image_column: str | None = option(None, "Its column of images.", default_text="`image`, `img`, `jpg` or `png`", of_type="huggingface")
    caption_column: str | None = option(
        None, "Its column of captions.", default_text="`caption`, `text` or `prompt`", of_type="huggingface"
    )
    urls: tuple[str, ...] = option(
        (),
        "Tars of a webdataset: paths, or patterns such as `pictures-{00000..00012}.tar`. Required.",
        default_text="required",
        one_or_many=True,
        of_type="webdataset",
    )
    disable_validation: bool = option(False, "Start no image-to-image validation from its images.")
    preserve_data_backend_cache: bool = option(
        None,
        "Do not list it again if it was listed before.",
        aliases=("preserve_data_cache_backend",),
        inherits="preserve_data_backend_cache",
    )
    skip_file_discovery: str = option(None, "Any value has the same effect.", inherits="skip_file_discovery")
    scan_for_errors: bool = option(False, "Compared latents with buckets.", does_nothing="every cached entry is verified when it is read")
    vae_cache_scan_behaviour: str = option("recreate", "What the scan did.", choices=("recreate", "sync"), does_nothing=_IN_PLACE)
    metadata_update_interval: int = option(3600, "Seconds between saves.", at_least=1, does_nothing="progress is saved as it is made")
    cache_file_suffix: str | None = option(None, "Suffix of bucket files.", does_nothing="no bucket files are written beside the data")
    delete_problematic_images: bool = option(False, "Deleted broken images.", does_nothing="source images are never deleted")
    delete_unwanted_images: bool = option(False, "Deleted small images.", does_nothing="source images are never deleted")
    max_workers: int = option(32, "Cache workers.", at_least=1, does_nothing=_WORKERS)
    process_queue_size: int = option(64, "Cache queue.", at_least=1, does_nothing=_WORKERS)
    disable_after_epoch_step: int | None = option(None, "Had no effect.", does_nothing="it never did")

    fallback_caption: str = ""  # of images that have no caption file; from the folder's name in the kohya layout
    aspect_bucket_alignment: int = 64  # pixels; from the option, or from the resolution where that is unset
    bucket_sizes: tuple[BucketSize, ...] = ()  # that the user's aspect_resolution_map gives
    aspect_bucket_rounding: int = DEFAULT_ROUNDING  # decimals of the aspects in it
    aspects_stay: bool = False  # random ones, for the whole run
    text_cache_dir: Path = Path()  # where the embeddings of its captions are kept ...
    text_entry: TextCacheConfig | None = None  # ... unless this entry of type aws keeps them in a bucket
    latents_prefix: str = ""  # in the bucket of an entry of type aws that names its cache_dir_vae; else latents are in that folder
    caption_filters: tuple[str, ...] = ()  # of the text_embeds entry that it uses
    shards: tuple[Path, ...] = ()  # the tars that `urls` stands for
    index_dir: Path | None = None  # where it is kept what their headers say
    condition: DatasetConfig | None = None  # with --controlnet, the entry that conditioning_data names
    mask: DatasetConfig | None = None  # the entry that mask_data names

    @property
    def trusts_listing(self) -> bool:
        """Whether the listing of an earlier run is used instead of a new one."""
        return self.preserve_data_backend_cache or bool(self.skip_file_discovery)

    @property
    def redraws_aspects(self) -> bool:
        """Whether the aspect ratio of a crop is drawn again for each epoch."""
        return self.vae_cache_clear_each_epoch and self.crop and self.crop_aspect == "random" and not self.aspects_stay

    @property
    def caption_table(self) -> str | None:
        """The key of the table that captions come from, or None."""
        return self.caption_strategy if self.caption_strategy in TABLES and not self.only_instance_prompt else None

    @property
    def reads_caption_files(self) -> bool:
        """Whether captions are in files with the names of the images."""
        return self.caption_strategy in ("textfile", "json") and not self.only_instance_prompt

    @property
    def caption_endings(self) -> tuple[str, ...]:
        """The endings of caption files, the preferred one first."""
        return self.caption_extensions or ((".json",) if self.caption_strategy == "json" else (".txt",))

    @property
    def tables_in_use(self) -> dict[str, TableConfig]:
        """The tables that captions or sizes come from, by key. What is asked for and not described is absent."""
        wanted = {self.caption_table, self.metadata_backend}
        return {key: table for key in TABLES if key in wanted and (table := getattr(self, key)) is not None}

    @property
    def alpha_is_mask(self) -> bool:
        """Whether the images' own alpha channels are their loss masks."""
        return self.mask_data == ALPHA

    @property
    def companions(self) -> dict[str, DatasetConfig]:
        """The entries with companions of its images, by role."""
        pairs = (("condition", self.condition), ("mask", self.mask))
        return {role: entry for role, entry in pairs if entry is not None}

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that contains the dataset, to which nothing may be written; None if there is none."""
        if self.type == "huggingface":
            return Path(self.path) if self.path and Path(self.path).is_dir() else None
        return self.instance_data_dir


@dataclass(frozen=True)
class DataConfig:
    """The enabled entries of the dataloader JSON."""

    datasets: tuple[DatasetConfig, ...] = ()
    text_caches: tuple[TextCacheConfig, ...] = ()
    companions: tuple[DatasetConfig, ...] = ()  # of dataset_type conditioning and mask
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def alignment(resolution: float, resolution_type: str) -> int:
    """The default aspect_bucket_alignment: 64, or 8 if a square image has less than a quarter of a megapixel."""
    megapixels = resolution if resolution_type == "area" else resolution**2 / 1e6
    return 64 if megapixels >= 0.25 else 8


def table_format(path: str) -> str | None:
    """The format of a table by its extension; None if the extension does not say."""
    endings = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}
    return endings.get(Path(path).suffix.lower())


def complete(dataset: DatasetConfig, options: Mapping[str, object]) -> DatasetConfig:
    """Set the values that follow from others."""
    asked = options["aspect_bucket_alignment"]
    grid = asked if isinstance(asked, int) else alignment(dataset.resolution, dataset.resolution_type)
    rounding = options["aspect_bucket_rounding"]
    decimals = rounding if isinstance(rounding, int) else DEFAULT_ROUNDING
    caches = options["cache_dir"]
    return dataclasses.replace(
        dataset,
        aspect_bucket_alignment=grid,
        aspect_bucket_rounding=decimals,
        aspects_stay=options["aspect_bucket_disable_rebuild"] is True,
        index_dir=caches / "tars" if isinstance(caches, Path) else None,
    )
