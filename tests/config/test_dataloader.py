from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import DatasetConfig, Entry, TableConfig, TextCacheConfig
from helpers.config.declare import Option, options_of
from helpers.config.options.data import TABLES
from helpers.config.read import read_config
from helpers.errors import ConfigError

Read = Callable[..., Config]
Refuse = Callable[..., str]
Write = Callable[..., None]

IMAGES: dict[str, Any] = {"id": "a", "instance_data_dir": "images"}
ROWS: dict[str, Any] = {"id": "a", "type": "huggingface", "path": "someone/pictures"}
TARS: dict[str, Any] = {"id": "a", "type": "webdataset", "urls": "a.tar"}
BUCKET: dict[str, Any] = {"id": "a", "type": "aws", "aws_bucket_name": "pictures", "aws_data_prefix": "train"}
TEXTS: dict[str, Any] = {**BUCKET, "id": "t", "dataset_type": "text_embeds", "aws_data_prefix": "caches/text"}


def test_a_data_set_falls_back_to_the_options(read: Read, write_data: Write) -> None:
    write_data([IMAGES, {**IMAGES, "id": "b", "resolution": 0.5, "caption_strategy": "textfile", "minimum_image_size": 0.1}])
    first, second = read("--resolution=2", "--minimum_image_size=1", "--caption_strategy=instanceprompt", "--instance_prompt=x").datasets
    assert (first.resolution, first.minimum_image_size, first.caption_strategy, first.instance_prompt) == (2, 1, "instanceprompt", "x")
    assert (second.resolution, second.minimum_image_size, second.caption_strategy) == (0.5, 0.1, "textfile")


def test_a_minimum_in_another_unit_is_not_inherited(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "resolution_type": "area", "resolution": 1.0}])
    (dataset,) = read("--resolution=1024", "--resolution_type=pixel", "--minimum_image_size=1024").datasets
    assert dataset.minimum_image_size is None


def test_cache_folders_default_to_the_output_folder(read: Read, write_data: Write) -> None:
    write_data([IMAGES, {**IMAGES, "id": "b", "cache_dir_vae": "latents"}])
    first, second = read("--output_dir=out").datasets
    assert (first.cache_dir_vae, first.text_cache_dir) == (Path("out/cache/latents"), Path("out/cache/text"))
    assert second.cache_dir_vae == Path("latents")


def test_a_single_text_entry_is_the_default_and_others_are_chosen_by_id(read: Read, write_data: Write, refuse: Refuse) -> None:
    write_data([IMAGES, {"id": "t", "dataset_type": "text_embeds", "cache_dir": "text"}])
    assert read().datasets[0].text_cache_dir == Path("text")
    other = {"id": "u", "dataset_type": "text_embeds", "cache_dir": "other"}
    text = {"id": "t", "dataset_type": "text_embeds", "cache_dir": "text"}
    write_data([IMAGES, {**IMAGES, "id": "b", "text_embed_cache": "u"}, {**text, "default": True}, other])
    assert [dataset.text_cache_dir for dataset in read().datasets] == [Path("text"), Path("other")]
    write_data([IMAGES, text, other])
    assert "datasets[1].default is missing" in refuse()
    write_data([IMAGES, {**text, "default": True}, {**other, "default": True}])
    assert "datasets[2].default is true for datasets[1] already" in refuse()
    write_data([{**IMAGES, "text_embeds": "tt"}, text])
    assert "datasets[0].text_embeds: 'tt' is not the id of a text_embeds entry" in refuse()


def test_disabled_entries_are_left_out_whatever_they_say(read: Read, write_data: Write, refuse: Refuse) -> None:
    write_data([IMAGES, {"disabled": True, "type": "aws"}, {"disable": True, "id": "b"}])
    assert [dataset.id for dataset in read().datasets] == ["a"]
    write_data([{**IMAGES, "disabled": True}])
    assert "has no enabled image dataset" in refuse()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{**IMAGES, "crop_stile": 1}], "datasets[0].crop_stile is not a key of an image dataset (did you mean crop_style?)"),
        ([{**IMAGES, "crop_style": "middle"}], "datasets[0].crop_style: 'middle' is not one of random, corner, center, face"),
        ([{**IMAGES, "type": "azure"}], "datasets[0].type: 'azure' is not one of local"),
        ([{**IMAGES, "repeats": "3"}], 'datasets[0].repeats is the text "3"; it must be a whole number'),
        ([{**IMAGES, "repeats": 1.5}], "datasets[0].repeats is the number 1.5; it must be a whole number"),
        ([{**IMAGES, "repeats": True}], "datasets[0].repeats is true; it must be a whole number"),
        ([{**IMAGES, "repeats": -1}], "datasets[0].repeats: -1 is below 0"),
        ([{**IMAGES, "crop": "true"}], 'datasets[0].crop is the text "true"; it must be true or false'),
        ([{**IMAGES, "disabled": 1}], "datasets[0].disabled is the number 1; it must be true or false"),
        ([{**IMAGES, "resolution": 0}], "datasets[0].resolution: 0.0 is not above 0"),
        ([{"id": "a"}], "datasets[0].instance_data_dir is missing; name the folder of the images"),
        ([{"instance_data_dir": "images"}], "datasets[0].id is missing; give every entry a name of its own"),
        ([{"id": "a", "instance_data_dir": "nowhere"}], "datasets[0].instance_data_dir: there is no folder nowhere"),
        ([{"id": "a", "instance_data_dir": "data.json"}], "datasets[0].instance_data_dir: data.json is a file"),
        ([{"id": "a", "instance_data_dir": "x" * 5000}], "datasets[0].instance_data_dir: there is no folder xxx"),
        ([{**IMAGES, "cache_dir_vae": "a\0b"}], "datasets[0].cache_dir_vae: holds a zero byte"),
        ([IMAGES, IMAGES], "datasets[1].id: 'a' is the id of datasets[0] already"),
        ([IMAGES, 7], "datasets[1] is the number 7; it must be an object"),
        ([{**IMAGES, "cache_dir": "x"}], "datasets[0].cache_dir is not a key of an image dataset; it belongs to a text_embeds entry"),
        ([IMAGES, {"id": "t", "dataset_type": "text_embeds", "repeats": 1}], "datasets[1].repeats is not a key of a text_embeds entry"),
        ([{**IMAGES, "text_embeds": "t", "text_embed_cache": "t"}], "datasets[0].text_embed_cache: says text_embeds a second time"),
        ([{**IMAGES, "cache_dir_vae": "images/latents"}], "dataset 'a', cache_dir_vae: images/latents is inside the images"),
        ([{**IMAGES, "path": "x"}], "datasets[0].path is a key of type huggingface; remove it, or set type"),
        ([{**ROWS, "instance_data_dir": "images"}], "datasets[0].instance_data_dir is a key of type local; remove it"),
        ([{"id": "a", "type": "huggingface"}], "datasets[0].path is missing; name the folder of the dataset"),
        ([{**ROWS, "path": "/no/where"}], "datasets[0].path: there is no folder /no/where; check the path"),
        ([{**ROWS, "caption_strategy": "filename"}], "datasets[0].caption_strategy: filename has nothing to say of rows"),
        ([{**ROWS, "path": "images", "cache_dir_vae": "images/x"}], "images/x is inside the images of dataset 'a'"),
        ([{"id": "a", "type": "webdataset"}], "datasets[0].urls is missing; name the tars"),
        ([{**TARS, "urls": []}], "datasets[0].urls is missing; name the tars"),
        ([{**TARS, "urls": [7]}], "datasets[0].urls is a list; it must be a text or a list of texts"),
        ([{**TARS, "urls": 7}], "datasets[0].urls is the number 7; it must be a text or a list of texts"),
        ([{**TARS, "urls": "s3://bucket/a.tar"}], "datasets[0].urls: 's3://bucket/a.tar' is an address; only paths are available yet"),
        ([{**TARS, "urls": "pipe:cat a.tar"}], "datasets[0].urls: 'pipe:cat a.tar' is an address"),
        ([{**TARS, "urls": "b-{0..2}.tar"}], "datasets[0].urls: there is no file b-0.tar; check the path (2 more like it)"),
        ([{**TARS, "urls": "b-{3..1}.tar"}], "datasets[0].urls: 'b-{3..1}.tar' {3..1} counts down"),
        ([{**TARS, "urls": "images"}], "datasets[0].urls: images is a folder; name the tars in it"),
        ([{**TARS, "urls": "data.json"}], "datasets[0].urls: data.json is not named .tar"),
        ([IMAGES, {"id": "t", "dataset_type": "text_embeds", "type": "webdataset"}], "datasets[1].type: webdataset is for images"),
    ],
)
def test_a_mistake_is_named_by_entry_key_and_remedy(entries: list[Any], said: str, write_data: Write, refuse: Refuse) -> None:
    write_data(entries)
    assert said in refuse()


MORE = {**IMAGES, "id": "b"}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"probability": 0}, {"probability": 0}, "datasets[0].probability is 0 here and in every other dataset"),
        ({"ignore_epochs": True}, {"ignore_epochs": True}, "datasets[0].ignore_epochs is true in every dataset"),
        ({"ignore_epochs": True}, {"probability": 0}, "datasets[1].probability is 0 in every dataset without ignore_epochs"),
        ({}, {"probability": 0, "ignore_epochs": True}, "datasets[1].probability is 0 in a set with ignore_epochs"),
        ({"probability": -1}, {}, "datasets[0].probability: -1.0 is below 0"),
        (
            {"is_regularisation_data": True},
            {"is_regularisation_data": True},
            "datasets[0].is_regularisation_data is true in every dataset",
        ),
    ],
)
def test_data_sets_that_make_no_epoch_together_are_refused(
    one: dict[str, Any], other: dict[str, Any], said: str, write_data: Write, refuse: Refuse
) -> None:
    write_data([{**IMAGES, **one}, {**MORE, **other}])
    assert refuse().startswith(said)
    assert len(refuse().splitlines()) == 1


def test_a_disabled_data_set_does_not_end_epochs(write_data: Write, refuse: Refuse) -> None:
    write_data([{**IMAGES, "ignore_epochs": True}, {**MORE, "disabled": True}])
    assert "ignore_epochs is true in every dataset" in refuse()


@pytest.mark.parametrize(
    "mistake",
    [
        {"resolution": "64", "resolution_type": "pixel"},
        {"resolution": 64, "resolution_type": "pixels"},
        {"id": 7},
        {"instance_data_dir": 7},
        {"caption_strategy": "instanceprompt", "instance_prompt": 7},
        {"type": "huggingface", "path": ["images"], "instance_data_dir": None},
        {"type": "webdataset", "urls": {"a": 1}, "instance_data_dir": None},
    ],
)
def test_a_value_that_cannot_be_read_is_told_once(mistake: dict[str, Any], write_data: Write, refuse: Refuse) -> None:
    write_data([{**IMAGES, **mistake}])
    assert refuse().count("\n") == 0


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://acc.r2.cloudflarestorage.com/pictures", "https://acc.r2.cloudflarestorage.com"),
        ("https://acc.r2.cloudflarestorage.com/pictures/", "https://acc.r2.cloudflarestorage.com"),
        ("https://pictures.s3.eu-central-1.amazonaws.com", "https://s3.eu-central-1.amazonaws.com"),
        ("https://pictures.nyc3.digitaloceanspaces.com", "https://nyc3.digitaloceanspaces.com"),
        ("https://ref.supabase.co/storage/v1/s3", "https://ref.supabase.co/storage/v1/s3"),
        ("https://ref.supabase.co/storage/v1/s3/pictures", "https://ref.supabase.co/storage/v1/s3"),
        ("http://pictures.example.com:9000", "http://pictures.example.com:9000"),  # a host of this name, not a bucket's address
        ("https://pictures.acc.r2.cloudflarestorage.com", "https://acc.r2.cloudflarestorage.com"),
        ("https://pictures.s3.us-west-004.backblazeb2.com/", "https://s3.us-west-004.backblazeb2.com"),
        ("https://pictures.storage.googleapis.com", "https://storage.googleapis.com"),
        ("https://pictures.oss-cn-hangzhou.aliyuncs.com", "https://oss-cn-hangzhou.aliyuncs.com"),
        (" http://localhost:9000/pictures ", "http://localhost:9000"),
    ],
)
def test_an_endpoint_may_include_the_bucket(url: str, expected: str, write_data: Write, read: Read) -> None:
    write_data([{**BUCKET, "aws_endpoint_url": url}])
    assert read().datasets[0].aws_endpoint_url == expected


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://acc.r2.cloudflarestorage.com/pictures2", "has 'pictures2' behind the host"),
        ("https://acc.r2.cloudflarestorage.com/pictures/train", "has 'pictures/train' behind the host"),
        ("https://s3.us-west-004.backblazeb2.com?X-Amz-Signature=0", "has a query behind the host"),
        ("https://pub-0123.r2.dev", "pub-0123.r2.dev is for browsers"),
        ("https://f004.backblazeb2.com/file/pictures", "f004.backblazeb2.com is for browsers"),
        ("https://dash.cloudflare.com/acc/r2/default/buckets/pictures", "dash.cloudflare.com is for browsers"),
        ("https://minio.example.com:99999", "is not an address"),
        ("https://minio.example .com", "is not an address"),
        ("s3://pictures/train", "is not an address"),
    ],
)
def test_an_endpoint_that_cannot_be_one_is_refused(url: str, why: str, write_data: Write, refuse: Refuse) -> None:
    write_data([{**BUCKET, "aws_endpoint_url": url}])
    assert why in refuse()


def test_empty_texts_count_as_not_set(write_data: Write, read: Read) -> None:
    """As the June 2024 release's example of a bucket has them."""
    write_data([{**IMAGES, "aws_data_prefix": "", "aws_bucket_name": "", "cache_dir_vae": "", "text_embeds": "", "caption_strategy": ""}])
    given = read().datasets[0]
    write_data([IMAGES])
    assert given == read().datasets[0]
    write_data([IMAGES, {"id": "t", "dataset_type": "text_embeds", "default": True, "cache_dir": "", "aws_data_prefix": ""}])
    assert read().text_caches[0].cache_dir is not None and str(read().text_caches[0].cache_dir) != "."


def test_aspects_in_the_wrong_order_are_named(write_data: Write, refuse: Refuse) -> None:
    write_data([{**IMAGES, "minimum_aspect": 2, "maximum_aspect": 0.5}])
    assert "minimum_aspect 2 is above maximum_aspect 0.5; exchange them." in refuse()


def test_every_mistake_of_a_file_is_told_at_once(write_data: Write, refuse: Refuse) -> None:
    write_data([{**IMAGES, "resolution": "64", "crop_stile": 1, "instance_data_dir": "nowhere"}, {"id": "a", "repeats": -1}])
    told = refuse().splitlines()
    assert [problem.split()[0].rstrip(":") for problem in sorted(told)] == [
        "datasets[0].crop_stile",
        "datasets[0].instance_data_dir",
        "datasets[0].resolution",
        "datasets[1].id",
        "datasets[1].instance_data_dir",
        "datasets[1].repeats",
    ]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{**BUCKET, "aws_bucket_name": None}], "datasets[0].aws_bucket_name is missing; name the bucket"),
        ([{**BUCKET, "aws_bucket_name": "pictures/cats"}], "datasets[0].aws_bucket_name: 'pictures/cats' has a /"),
        ([{**BUCKET, "aws_bucket_name": "a b"}], "datasets[0].aws_bucket_name: 'a b' is not the name of a bucket"),
        ([{**BUCKET, "aws_endpoint_url": "s3.example.com"}], "datasets[0].aws_endpoint_url is not an address"),
        ([{**BUCKET, "aws_endpoint_url": "https://CANARY:x@s3.example.com"}], "datasets[0].aws_endpoint_url: holds a user or password"),
        ([{**BUCKET, "aws_access_key_id": "CANARY"}], "datasets[0].aws_secret_access_key is missing; give both keys"),
        ([{**BUCKET, "aws_secret_access_key": "CANARY"}], "datasets[0].aws_access_key_id is missing; give both keys"),
        ([{**BUCKET, "aws_data_prefix": "../cats/x"}], "datasets[0].aws_data_prefix: '../cats/x' is not a prefix"),
        ([{**BUCKET, "instance_data_dir": "images"}], "datasets[0].instance_data_dir is a key of type local; remove it"),
        ([{**BUCKET, "cache_dir_vae": "/"}], "datasets[0].cache_dir_vae is the whole bucket; name a prefix"),
        (
            [{**BUCKET, "cache_dir_vae": "train/latents"}],
            "cache_dir_vae: train/latents is inside the images of dataset 'a' (below train/)",
        ),
        (
            [{**BUCKET, "aws_data_prefix": "", "cache_dir_vae": "x"}],
            "(the whole bucket: give it an aws_data_prefix), which are never written to",
        ),
        ([BUCKET, {**TEXTS, "aws_data_prefix": "train/text"}], "text_embeds 't', aws_data_prefix: train/text is inside the images of"),
        ([BUCKET, {**TEXTS, "aws_data_prefix": None}], "datasets[1].aws_data_prefix is missing; name the folder of the embeddings"),
        ([BUCKET, {**TEXTS, "cache_dir": "x"}], "datasets[1].cache_dir is for local folders; embeddings in a bucket are below"),
        (
            [{**IMAGES, "aws_bucket_name": "x"}],
            'datasets[0].aws_bucket_name is for buckets, and this entry is of type local; say "type": "aws"',
        ),
        ([{**IMAGES, "cache_local_limit_gb": 1}], "datasets[0].cache_local_limit_gb is for buckets"),
        (
            [{**IMAGES, "id": "b"}, {**BUCKET, "cache_local_dir": "images/x"}],
            "'a', cache_local_dir: images/x is inside the images of dataset 'b'",
        ),
    ],
)
def test_a_mistake_about_a_bucket_is_named_by_entry_key_and_remedy(
    entries: list[Any], said: str, write_data: Write, refuse: Refuse
) -> None:
    write_data(entries)
    assert said in (told := refuse())
    assert "CANARY" not in told


def test_a_bucket_needs_no_more_than_its_name_and_may_say_null(read: Read, write_data: Write) -> None:
    nothing = dict.fromkeys(item.name for item in options_of(Entry) if item.name.startswith("aws_"))
    write_data([{**nothing, "id": "a", "type": "aws", "aws_bucket_name": "pictures"}, {**IMAGES, **nothing, "id": "b"}])
    dataset, _ = read().datasets
    assert (dataset.aws_bucket_name, dataset.latents_prefix, dataset.text_entry) == ("pictures", "", None)
    assert dataset.cache_dir_vae.parts[-2:] == ("cache", "latents")


def test_keys_are_in_no_description_of_the_settings(read: Read, write_data: Write) -> None:
    keys = {"aws_access_key_id": "CANARY1", "aws_secret_access_key": "CANARY2"}
    write_data([{**BUCKET, **keys, "cache_dir_vae": "/caches/latents/"}, {**TEXTS, **keys}])
    config = read()
    [dataset] = config.datasets
    assert (dataset.aws_access_key_id, dataset.aws_secret_access_key) == ("CANARY1", "CANARY2")
    assert dataset.latents_prefix == "caches/latents" and dataset.text_entry == config.text_caches[0]
    told = json.dumps(config.to_json())
    assert "CANARY" not in told + config.describe() + repr(config) and '"text_entry": "t"' in told


def test_a_mistake_is_named_by_file_and_line(write_data: Write, refuse: Refuse) -> None:
    write_data('[\n  // first\n  {"id": "a", "instance_data_dir": "images",\n   "crop_stile": "x",},\n]')
    assert refuse() == "datasets[0].crop_stile is not a key of an image dataset (did you mean crop_style?) (data.json, line 4)."


def test_the_file_must_be_a_list(write_data: Write, refuse: Refuse) -> None:
    write_data('{"id": "a"}')
    assert "data.json: holds an object; it must be a list of datasets" in refuse()


def test_relative_folders_can_be_taken_from_another_place(folder: Path, write_data: Write, read: Read) -> None:
    write_data([{**IMAGES, "cache_dir_vae": "latents"}])
    (folder / "elsewhere" / "images").mkdir(parents=True)
    data = read_dataloader(folder / "data.json", read().values(), base=folder / "elsewhere")
    assert data.datasets[0].instance_data_dir == folder / "elsewhere" / "images"
    assert data.datasets[0].cache_dir_vae == folder / "elsewhere" / "latents"


# -- captions and tables ----------------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {**IMAGES, "caption_strategy": "csv", "csv": {"path": "t.csv"}}


@pytest.fixture
def table(folder: Path) -> Path:
    """A file that is there; its content is no matter of settings."""
    path = folder / "images" / "t.csv"
    path.touch()
    return path


def test_a_table_falls_back_to_the_options_for_its_columns(table: Path, read: Read, write_data: Write) -> None:
    own = {"path": str(table), "filename_column": "file", "identifier_includes_extension": True, "fallback_caption_column": "alt"}
    write_data([TABLE, {**TABLE, "id": "b", "csv": own}])
    first, second = (dataset.csv for dataset in read("--parquet_filename_column=name", "--parquet_caption_column=text").datasets)
    assert first == TableConfig("t.csv", filename_column="name", caption_column="text")
    assert second == TableConfig(str(table), "file", True, "text", "alt")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"csv": {"path": "t.csv", "capton_column": "a"}},
            "datasets[0].csv.capton_column is not a key of a table (did you mean caption_column?)",
        ),
        (
            {"csv": {"path": "t.csv", "width_column": 3}},
            "datasets[0].csv.width_column is the number 3; it must be text (data.json, line 8)",
        ),
        ({"csv": {}}, "datasets[0].csv.path is missing; name the table"),
        ({"csv": "t.csv"}, 'datasets[0].csv is the text "t.csv"; it must be an object with a path'),
        ({"csv": {"path": "no.csv"}}, "datasets[0].csv.path: there is no file images/no.csv; name it from the dataset's folder"),
        ({"csv": None}, "datasets[0].csv is missing; caption_strategy csv needs it"),
        ({"metadata_backend": "parquet"}, "datasets[0].parquet is missing; metadata_backend parquet needs it"),
        ({"caption_strategy": "filename", "multiple_captions": True}, "dataset 'a': multiple_captions needs caption_strategy textfile"),
        ({"shuffle_tags": True, "tag_separator": ""}, "dataset 'a': tag_separator is empty; name what stands between tags"),
        ({"keep_tags": 1}, "dataset 'a': keep_tags needs shuffle_tags: true"),
    ],
)
def test_a_mistake_about_captions_or_tables_is_named(
    changed: dict[str, Any], said: str, table: Path, write_data: Write, refuse: Refuse
) -> None:
    write_data([{**TABLE, **changed}])
    assert said in refuse()


def test_a_table_that_nothing_asks_for_and_keys_of_it_that_do_nothing_say_so(table: Path, read: Read, write_data: Write) -> None:
    write_data([{**TABLE, "parquet": {"path": "x"}, "csv": {"path": "t.csv", "luminance_column": "l"}}])
    assert read().notes == (
        "data.json: datasets[0].csv.luminance_column does nothing: nothing is chosen by it.",
        "data.json: datasets[0].parquet does nothing: neither caption_strategy nor metadata_backend is parquet.",
    )


def test_filters_reach_the_data_sets_that_use_their_entry(folder: Path, read: Read, write_data: Write) -> None:
    (folder / "filters.txt").write_text("plain \n\ns/a/b/\n")
    (folder / "filters.json").write_text('["one", "^two"]')
    text = {"id": "t", "dataset_type": "text_embeds", "default": True, "caption_filter_list": "filters.txt"}
    other = {"id": "u", "dataset_type": "text_embeds", "caption_filter_list": "filters.json"}
    write_data([IMAGES, {**IMAGES, "id": "b", "text_embeds": "u"}, text, other])
    assert [dataset.caption_filters for dataset in read().datasets] == [("plain ", "s/a/b/"), ("one", "^two")]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["ok", "(a"], "'(a' is not a regular expression (missing ), unterminated subpattern at position 0); put a backslash before"),
        (["s/(a)/\\2/"], "is not a regular expression (invalid group reference 2"),
        (["s/a/b/c"], "'s/a/b/c' is not of the form s/a/b/; a slash inside a or b is written \\/"),
        (["((a{500}){500}){9}"], "'((a{500}){500}){9}' asks for more than 100,000 repeats; write it with smaller numbers"),
        (["s//b/"], "'s//b/' replaces nothing"),
        ([""], "caption_filter_list: has an empty line, which would be found everywhere; remove it"),
        (["x" * 1001], "has 1,001 characters; a line has at most 1,000"),
        ([1], "is a list; it must be a list of texts, or the path of a .json or .txt file"),
        ("filters.csv", "filters.csv is neither a .json nor a .txt file"),
        ("nowhere.txt", "nowhere.txt: No such file or directory; check the path"),
    ],
)
def test_a_filter_that_cannot_be_used_is_named_before_the_run(lines: Any, said: str, write_data: Write, refuse: Refuse) -> None:
    write_data([IMAGES, {"id": "t", "dataset_type": "text_embeds", "caption_filter_list": lines}])
    assert said in refuse()
    write_data([{**IMAGES, "caption_filter_list": lines}])
    assert "datasets[0].caption_filter_list is not a key of an image dataset; it belongs to a text_embeds entry" in refuse()


def keys(kind: type[Entry]) -> Iterator[Any]:
    for item in options_of(kind):
        yield pytest.param(kind, item, id=f"{kind.__name__}.{item.name}")


# Keys that a key needs beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "crop_style": {"crop": True},
    "crop_aspect": {"crop": True, "crop_aspect_buckets": [1.5]},
    "crop_aspect_buckets": {"crop": True, "crop_aspect": "random"},
    "maximum_image_size": {"crop": True, "target_downsample_size": 1},
    "target_downsample_size": {"crop": True, "maximum_image_size": 1},
    **dict.fromkeys(
        ("multiple_captions", "keep_tags", "tag_separator", "caption_extensions"), {"caption_strategy": "textfile", "shuffle_tags": True}
    ),
}
OTHER_VALUES: dict[str, Any] = {
    "crop_style": "center",  # the last choice, face, needs a library
    "crop_aspect_buckets": [{"aspect": 1.5, "weight": 2}, 1],
}
OF_FILES = ("caption_folder", "json")
OF_COMPANIONS = ("conditioning_data", "resize_filter", "mask_data", "mask_outside_weight")
SAMPLES = {"type": "aws", "path": "someone/pictures", "urls": ["a.tar", "b.tar"]}
STARTS = {"huggingface": ROWS, "webdataset": TARS}


def other_value(item: Option) -> Any:
    """A usable JSON value that is not the default."""
    if item.name in OTHER_VALUES:
        return OTHER_VALUES[item.name]
    if item.name in SAMPLES:
        return SAMPLES[item.name]
    choices = [choice for choice in item.choices if choice != item.default and choice not in item.unavailable_choices]
    if choices or item.unavailable_choices:
        return (choices or item.unavailable_choices)[-1]
    if item.kind is bool:
        return not item.default
    if item.kind in (int, float):
        return (item.default or item.at_least or item.above or 0) + 1
    values: dict[type, Any] = {str: "text", Path: "folder", tuple: ("a",), dict: {"a": 1}}
    return values[item.kind]


@pytest.mark.parametrize(("kind", "item"), [*keys(DatasetConfig), *keys(TextCacheConfig)])
def test_every_key_lands_in_its_field_or_is_refused_by_name(
    kind: type[Entry], item: Option, folder: Path, write_data: Write, read: Read, refuse: Refuse
) -> None:
    if item.name in (
        "id",
        "dataset_type",
        "disabled",
        "instance_data_dir",
        "text_embeds",
        "metadata_backend",
        *TABLES,
        *OF_COMPANIONS,
        *OF_FILES,
    ):
        return  # tested by name
    value = other_value(item)
    start = STARTS.get(item.of_type, IMAGES) if kind is DatasetConfig else {"id": "t", "dataset_type": "text_embeds"}
    for name in ("a.tar", "b.tar"):
        (folder / name).touch()
    start = {**start, "resolution": 512} if value == "pixel" else {**start, **BESIDE.get(item.name, {})}
    start = {**start, "only_instance_prompt": True} if value in TABLES else start  # that needs no table
    if item.name.startswith(("aws_", "cache_local_")) or value == "aws":
        start = BUCKET if kind is DatasetConfig else TEXTS
        start = {**start, "aws_access_key_id": "text", "aws_secret_access_key": "text"}
        value = "https://s3.example.com" if item.name == "aws_endpoint_url" else value
    write_data([{**start, item.name: value}, {**IMAGES, "id": "beside"}])
    if item.not_yet or value in item.unavailable_choices:
        assert f"datasets[0].{item.name}" in (told := refuse("--instance_prompt=x")) and "is not available yet" in told
        return
    config = read("--instance_prompt=x")
    entry = config.datasets[0] if kind is DatasetConfig else config.text_caches[0]
    landed = getattr(entry, item.name)
    expected = tuple(map(item.each, value)) if item.kind is tuple else value
    assert (str(landed) if isinstance(landed, Path) else landed) == expected
    assert any(f"datasets[0].{item.name} does nothing" in note for note in config.notes) == bool(item.does_nothing)


def test_the_british_centre_is_the_center(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "crop_style": "centre"}])
    assert read().datasets[0].crop_style == "center"


def test_captions_come_with_rows_and_tars_unless_something_else_is_asked_for(folder: Path, read: Read, write_data: Write) -> None:
    (folder / "a.tar").touch()
    for entry in (ROWS, TARS):
        write_data([entry, {**IMAGES, "id": "b"}, {**entry, "id": "c", "caption_strategy": "instanceprompt"}])
        assert [dataset.caption_strategy for dataset in read("--instance_prompt=x").datasets] == ["textfile", "filename", "instanceprompt"]
        assert read("--instance_prompt=x", "--caption_strategy=instanceprompt").datasets[0].caption_strategy == "instanceprompt"


def test_a_library_that_is_not_there_is_named_with_its_remedy(write_data: Write, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data([ROWS])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "torch" else None)
    remedy = ".venv/bin/pip install -c constraints/pins.txt datasets"
    assert f"datasets[0].type: huggingface needs the library datasets; {remedy}" in refuse("--report_to=none")


def test_patterns_of_tars_stand_for_files_in_their_order(folder: Path, read: Read, write_data: Write) -> None:
    names = ["a-08.tar", "a-09.tar", "a-10.tar", "x_1.tar", "x_2.tar", "y_1.tar", "y_2.tar", "z.tar"]
    (folder / "sub").mkdir()
    for name in names:
        (folder / "sub" / name).touch()
    write_data([{**TARS, "urls": ["sub/a-{08..10}.tar", "sub/{x,y}_{1..2}.tar", "sub/z.tar"]}])
    assert read().datasets[0].shards == tuple(Path("sub") / name for name in names)
    data = read_dataloader(folder / "data.json", read().values(), base=folder)
    assert data.datasets[0].shards == tuple(folder / "sub" / name for name in names)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{0..999999999999}.tar", "stands for more than 100,000 files"),
        ("{000..999}{000..999}.tar", "stands for more than 100,000 files"),
        ("{1..2.tar", "has a brace without its partner"),
        ("{{1..2}}.tar", "has a brace without its partner"),
        ("{}.tar", "{} is neither a range"),
        ("{a..c}.tar", "{a..c} is neither a range"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(pattern: str, said: str, write_data: Write, refuse: Refuse) -> None:
    write_data([{**TARS, "urls": pattern}])
    assert f"datasets[0].urls: {pattern!r} {said}" in refuse()


def test_tars_of_one_name_are_refused(folder: Path, write_data: Write, refuse: Refuse) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "0.tar").touch()
    write_data([{**TARS, "urls": "{one,two}/0.tar"}])
    assert "datasets[0].urls: two/0.tar and one/0.tar have one name, which keys begin with; make them two datasets" in refuse()
    write_data([{**TARS, "urls": ["one/0.tar", "one/0.tar"]}])
    assert "datasets[0].urls: one/0.tar stands there twice" in refuse()


KEYS = [item.name for kind in (DatasetConfig, TextCacheConfig) for item in options_of(kind)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
ENTRIES = st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(["local", "image", "text_embeds", "a", "pixel", "area"]))


@given(
    st.lists(ENTRIES | JSON, max_size=3),
    st.lists(st.sampled_from(["--seed", "--resolution=", "x", "--use_ema=maybe", "--demo", "--=", ""])),
)
def test_whatever_is_written_is_read_or_explained(entries: list[Any], flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        try:
            read_config([*flags, "--pretrained_model_name_or_path=a/b", f"--data_backend_config={path}"], {}, Axes())
        except ConfigError as error:
            assert error.problems and all(len(problem) > 10 for problem in error.problems)


EDGES: dict[str, Any] = {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": "edges"}


@pytest.fixture
def edges(folder: Path) -> None:
    (folder / "edges").mkdir()


@pytest.mark.usefixtures("edges")
def test_a_data_set_has_the_conditions_that_it_names(read: Read, write_data: Write) -> None:
    nearest = {**EDGES, "resize_filter": "nearest", "crop": True, "caption_strategy": "textfile"}
    write_data([{**IMAGES, "conditioning_data": "edges"}, nearest])
    config = read("--controlnet")
    [images] = config.datasets
    assert images.condition is not None and images.condition.instance_data_dir == Path("edges")
    assert images.condition.resize_filter == "nearest" and config.conditioning == (images.condition,)
    does_nothing = "does nothing: a conditioning image is cropped as its image is."
    assert [note for note in config.notes if "datasets[1]" in note] == [
        f"data.json: datasets[1].{key} {does_nothing}" for key in ("crop", "caption_strategy")
    ]


@pytest.mark.usefixtures("edges")
def test_conditions_wait_for_a_controlnet(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "conditioning_data": "edges"}, EDGES, {**EDGES, "id": "unused"}])
    config = read()
    assert config.datasets[0].condition is None
    assert "data.json: datasets[0].conditioning_data does nothing without --controlnet." in config.notes
    assert "data.json: datasets[2] does nothing: no dataset's conditioning_data names it." in config.notes


@pytest.mark.usefixtures("edges")
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([IMAGES, EDGES], "datasets[0].conditioning_data is missing; with --controlnet each dataset names the entry of dataset_type"),
        (
            [{**IMAGES, "conditioning_data": "edge"}, EDGES],
            "'edge' is not the id of an entry of dataset_type conditioning (did you mean edges?)",
        ),
        ([{**IMAGES, "conditioning_data": "a"}, EDGES], "'a' is not the id of an entry of dataset_type conditioning"),
        (
            [{**IMAGES, "conditioning_data": "edges", "resize_filter": "nearest"}, EDGES],
            "datasets[0].resize_filter is for conditioning sets",
        ),
        (
            [{**IMAGES, "conditioning_data": "edges"}, {**EDGES, "instance_data_dir": "none"}],
            "datasets[1].instance_data_dir: there is no folder",
        ),
        ([{**IMAGES, "conditioning_data": "edges"}, {**EDGES, "id": "a"}], "datasets[1].id: 'a' is the id of datasets[0] already"),
        ([EDGES], "has no enabled image dataset"),
    ],
)
def test_conditions_that_cannot_be_meant_are_named(entries: list[dict[str, Any]], said: str, write_data: Write, refuse: Refuse) -> None:
    write_data(entries)
    assert said in refuse("--controlnet")


MASKS: dict[str, Any] = {"id": "masks", "dataset_type": "mask", "instance_data_dir": "edges"}


@pytest.mark.usefixtures("edges")
def test_a_dataset_has_the_masks_that_it_names(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "mask_data": "masks", "mask_outside_weight": 0.1}, {**MASKS, "crop": True, "resize_filter": "nearest"}])
    config = read()
    [images] = config.datasets
    assert images.mask is not None and config.masks == (images.mask,) and images.companions == {"mask": images.mask}
    assert (images.mask.instance_data_dir, images.mask_outside_weight, images.alpha_is_mask) == (Path("edges"), 0.1, False)
    assert [note for note in config.notes if "datasets[1]" in note] == [
        f"data.json: datasets[1].{key} does nothing: a mask is cropped as its image is." for key in ("crop", "resize_filter")
    ]
    write_data([{**IMAGES, "mask_data": "alpha"}])
    [images] = read().datasets
    assert images.alpha_is_mask and images.mask is None and images.mask_outside_weight == 0


@pytest.mark.usefixtures("edges")
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{**IMAGES, "mask_data": "mask"}, MASKS], "'mask' is not the id of an entry of dataset_type mask (did you mean masks?)"),
        ([{**IMAGES, "mask_data": "alfa"}], "'alfa' is not the id of an entry of dataset_type mask (did you mean alpha?)"),
        ([{**IMAGES, "mask_data": "edges"}, EDGES], "'edges' is not the id of an entry of dataset_type mask"),
        ([{**IMAGES, "mask_data": "alpha"}, {**MASKS, "id": "alpha"}], '"mask_data": "alpha" means the alpha channel of the images'),
        ([{**IMAGES, "mask_data": "masks"}, {**MASKS, "instance_data_dir": "images"}], "so each image would be its own mask"),
        ([{**IMAGES, "mask_data": "masks", "mask_outside_weight": -0.1}, MASKS], "datasets[0].mask_outside_weight: -0.1 is below 0"),
        ([{**IMAGES, "mask_data": "masks"}, {**MASKS, "instance_data_dir": "none"}], "datasets[1].instance_data_dir: there is no folder"),
    ],
)
def test_masks_that_cannot_be_meant_are_named(entries: list[dict[str, Any]], said: str, write_data: Write, refuse: Refuse) -> None:
    write_data(entries)
    assert said in refuse()


def test_masks_among_the_images_are_refused(folder: Path, write_data: Write, refuse: Refuse) -> None:
    (folder / "images" / "masks").mkdir()
    write_data([{**IMAGES, "mask_data": "masks"}, {**MASKS, "instance_data_dir": "images/masks"}])
    assert "are inside the folder of the images, so they would be trained as images; move them" in refuse()


@pytest.mark.usefixtures("edges")
def test_masks_without_an_effect_are_named(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "mask_outside_weight": 0.5}, {**IMAGES, "id": "b", "mask_data": "alpha", "mask_outside_weight": 1}, MASKS])
    notes = read().notes
    assert "data.json: datasets[0].mask_outside_weight does nothing without mask_data." in notes
    assert any(note.startswith("data.json: datasets[1].mask_data does nothing with mask_outside_weight 1: ") for note in notes)
    assert "data.json: datasets[2] does nothing: no dataset's mask_data names it." in notes


@pytest.mark.usefixtures("edges")
def test_nothing_is_written_into_a_folder_of_conditions(write_data: Write, refuse: Refuse) -> None:
    write_data([{**IMAGES, "conditioning_data": "edges"}, EDGES])
    assert "is inside the images of dataset 'edges'" in refuse("--controlnet", "--output_dir=edges/out")


def folders(*names: str) -> None:
    for name in names:
        (Path("images") / name).mkdir(parents=True)


def test_kohya_folders_are_recognized_and_used_by_one_key(read: Read, write_data: Write, refuse: Refuse) -> None:
    folders("10_sks dog", "1_dog", ".thumbs")
    write_data([IMAGES])
    assert [dataset.id for dataset in read().datasets] == ["a"]
    assert any("'10_sks dog'" in note and '"layout": "kohya"' in note for note in read().notes)
    write_data([{**IMAGES, "layout": "plain"}])
    assert not any("kohya" in note for note in read().notes)
    write_data([{**IMAGES, "layout": "kohya"}])
    first, second = read().datasets
    assert (first.id, first.repeats, first.fallback_caption) == ("a/10_sks dog", 9, "sks dog")
    assert (second.id, second.repeats, second.fallback_caption) == ("a/1_dog", 0, "dog")
    assert (first.instance_data_dir, first.caption_strategy) == (Path("images/10_sks dog"), "textfile")
    assert first.caption_endings == (".txt", ".caption") and not any("kohya" in note for note in read().notes)
    folders("others")
    assert any("1 folder without a number, such as 'others'" in note for note in read().notes)
    write_data([{**IMAGES, "layout": "kohya", "repeats": 3}])
    assert "datasets[0].repeats: cannot be used" in refuse()
    write_data([{**IMAGES, "layout": "kohya", "instance_data_dir": "images/1_dog"}])
    assert "there is no folder such as 10_dog" in refuse()


def test_a_list_of_resolutions_stands_for_a_dataset_each(read: Read, write_data: Write, refuse: Refuse) -> None:
    several = {**IMAGES, "resolution": [512, 256], "resolution_type": "pixel", "probability": 1}
    write_data([several])
    sizes = [(each.id, each.resolution, each.minimum_image_size, each.aspect_bucket_alignment) for each in read().datasets]
    assert sizes == [("a@512", 512, 512, 64), ("a@256", 256, 256, 8)]
    assert [each.probability for each in read().datasets] == [0.5, 0.5]
    write_data([{**several, "minimum_image_size": 0}])
    assert [each.minimum_image_size for each in read().datasets] == [0, 0]
    for wrong, why in {"[]": "empty list", "[512, 512]": "a size twice", '["512"]': "must be a number", "[0]": "not above 0"}.items():
        write_data([{**several, "resolution": json.loads(wrong)}])
        assert why in refuse(), wrong
    write_data([{**several, "resolution_type": "area"}])
    assert '"resolution_type": "pixel"' in refuse()
    write_data([several, {**IMAGES, "id": "a@256"}])
    assert "'a@256' is the id of" in refuse()


def test_caption_files_are_named_by_ending_folder_and_key(read: Read, write_data: Write, refuse: Refuse) -> None:
    folders("captions")
    write_data([{**IMAGES, "caption_strategy": "textfile", "caption_extensions": ["Caption", ".txt"], "caption_folder": "images/captions"}])
    (dataset,) = read().datasets
    assert (dataset.caption_endings, dataset.caption_folder) == ((".caption", ".txt"), Path("images/captions"))
    write_data([{**IMAGES, "caption_strategy": "json", "json": {"caption_key": "prompt"}}])
    (dataset,) = read().datasets
    assert dataset.json is not None and (dataset.caption_endings, dataset.json.caption_key) == ((".json",), "prompt")
    write_data([{**IMAGES, "caption_strategy": "json", "json": {"captoin_key": "prompt"}, "caption_folder": "nowhere"}])
    assert "did you mean caption_key?" in refuse() and "there is no folder nowhere" in refuse()
    write_data([{**IMAGES, "caption_extensions": [".tags"]}])
    assert any("caption_extensions does nothing" in note for note in read().notes)
    write_data([{**TARS, "caption_strategy": "json"}])
    assert "use textfile" in refuse()


@pytest.mark.parametrize(
    ("path", "shown"),
    {
        "D:\new\train": r"there is no folder 'D:\new\train'; in JSON, write each backslash twice",
        "images ": "there is no folder 'images '; remove the blank at its end",
        "\x1b[2Jred": r"there is no folder '\x1b[2Jred'; check the path",
        "\u202egpj": r"there is no folder '\u202egpj'; check the path",
        "nowhere": "there is no folder nowhere; check the path",
    }.items(),
)
def test_a_path_is_shown_so_that_its_fault_can_be_seen(path: str, shown: str, refuse: Refuse, write_data: Write) -> None:
    write_data([{**IMAGES, "instance_data_dir": path}])
    assert shown in refuse()
