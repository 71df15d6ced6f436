from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.config.config import Config
from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import DatasetConfig, Entry, TableConfig, TextCacheConfig
from helpers.config.declare import Option, options_of
from helpers.config.options.data import TABLES
from helpers.config.read import FactsByAxis, read_config
from helpers.errors import ConfigError

Read = Callable[..., Config]
Refuse = Callable[..., str]
Write = Callable[..., None]

IMAGES: dict[str, Any] = {"id": "a", "instance_data_dir": "images"}


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
    assert "has no enabled image data set" in refuse()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{**IMAGES, "crop_stile": 1}], "datasets[0].crop_stile is not a key of an image data set (did you mean crop_style?)"),
        ([{**IMAGES, "crop_style": "middle"}], "datasets[0].crop_style: 'middle' is not one of random, corner, center, face"),
        ([{**IMAGES, "type": "azure"}], "datasets[0].type: 'azure' is not one of local"),
        ([{**IMAGES, "type": "aws"}], "datasets[0].type: 'aws' is not available yet; today it can be local"),
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
        ([{**IMAGES, "cache_dir": "x"}], "datasets[0].cache_dir is not a key of an image data set; it belongs to a text_embeds entry"),
        ([IMAGES, {"id": "t", "dataset_type": "text_embeds", "repeats": 1}], "datasets[1].repeats is not a key of a text_embeds entry"),
        ([{**IMAGES, "text_embeds": "t", "text_embed_cache": "t"}], "datasets[0].text_embed_cache: says text_embeds a second time"),
        ([{**IMAGES, "cache_dir_vae": "images/latents"}], "data set 'a', cache_dir_vae: images/latents is inside the images"),
    ],
)
def test_a_mistake_is_named_by_entry_key_and_remedy(entries: list[Any], said: str, write_data: Write, refuse: Refuse) -> None:
    write_data(entries)
    assert said in refuse()


def test_a_mistake_is_named_by_file_and_line(write_data: Write, refuse: Refuse) -> None:
    write_data('[\n  // first\n  {"id": "a", "instance_data_dir": "images",\n   "crop_stile": "x",},\n]')
    assert refuse() == "datasets[0].crop_stile is not a key of an image data set (did you mean crop_style?) (data.json, line 4)."


def test_the_file_must_be_a_list(write_data: Write, refuse: Refuse) -> None:
    write_data('{"id": "a"}')
    assert "data.json: holds an object; it must be a list of data sets" in refuse()


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
        ({"csv": {"path": "no.csv"}}, "datasets[0].csv.path: there is no file images/no.csv; name it from the data set's folder"),
        ({"csv": None}, "datasets[0].csv is missing; caption_strategy csv needs it"),
        ({"metadata_backend": "parquet"}, "datasets[0].parquet is missing; metadata_backend parquet needs it"),
        ({"caption_strategy": "filename", "multiple_captions": True}, "data set 'a': multiple_captions needs caption_strategy textfile"),
        ({"shuffle_tags": True, "tag_separator": ""}, "data set 'a': tag_separator is empty; name what stands between tags"),
        ({"keep_tags": 1}, "data set 'a': keep_tags needs shuffle_tags: true"),
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
    assert "datasets[0].caption_filter_list is not a key of an image data set; it belongs to a text_embeds entry" in refuse()


def keys(kind: type[Entry]) -> Iterator[Any]:
    for item in options_of(kind):
        yield pytest.param(kind, item, id=f"{kind.__name__}.{item.name}")


OF_CAPTIONS = ("multiple_captions", "keep_tags", "tag_separator")  # they need others beside them


def other_value(item: Option) -> Any:
    """A usable JSON value that is not the default."""
    choices = [choice for choice in item.choices if choice != item.default and choice not in item.later]
    if choices or item.later:
        return (choices or item.later)[-1]
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
    if item.name in ("id", "dataset_type", "disabled", "instance_data_dir", "text_embeds", "metadata_backend", *TABLES):
        return  # tested by name
    value = other_value(item)
    start = IMAGES if kind is DatasetConfig else {"id": "t", "dataset_type": "text_embeds"}
    start = {**start, "resolution": 512} if value == "pixel" else start
    start = {**start, "only_instance_prompt": True} if value in TABLES else start  # that needs no table
    start = {**start, "caption_strategy": "textfile", "shuffle_tags": True} if item.name in OF_CAPTIONS else start
    write_data([{**start, item.name: value}, *([] if kind is DatasetConfig else [IMAGES])])
    if item.not_yet or value in item.later:
        assert f"datasets[0].{item.name}" in (told := refuse("--instance_prompt=x")) and "is not available yet" in told
        return
    config = read("--instance_prompt=x")
    entry = config.datasets[0] if kind is DatasetConfig else config.text_caches[0]
    landed = getattr(entry, item.name)
    assert (str(landed) if isinstance(landed, Path) else landed) == value
    assert any(f"datasets[0].{item.name} does nothing" in note for note in config.notes) == bool(item.does_nothing)


def test_the_british_centre_is_the_center(read: Read, write_data: Write) -> None:
    write_data([{**IMAGES, "crop_style": "centre"}])
    assert read().datasets[0].crop_style == "center"


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
            read_config([*flags, "--pretrained_model_name_or_path=a/b", f"--data_backend_config={path}"], {}, FactsByAxis())
        except ConfigError as error:
            assert error.problems and all(len(problem) > 10 for problem in error.problems)
