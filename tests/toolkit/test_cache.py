"""The cache program finds every problem, explains entries, and deletes what no run needs and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.choices import known_axes
from helpers.config.read import read_config
from helpers.config.saved import read_saved_config
from helpers.data.cache.cache import Cache, Writer, record_key
from helpers.data.cache.index import INDEX
from helpers.data.cache.remote import RemoteShards
from helpers.errors import ConfigError
from tests.harness import ROOT, Trainer, draw_images
from tests.storage.memory import MemoryBackend
from tests.storage.s3_server import KEY, SECRET
from toolkit.cache.command import main

SETTINGS = {"max_train_steps": 1, "checkpointing_steps": 100, "validation_prompt": None, "validation_disable_unconditional": True}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of one step on six images, two of them identical."""
    folder = tmp_path_factory.mktemp("original")
    images = draw_images(folder / "images", 5)
    shutil.copy(images / "a_red_circle_00.png", images / "a_copy.png")
    trainer = Trainer(images, folder, settings=SETTINGS)
    trainer.dataloader(crop=False, flip=False)  # so that equal files are cut alike
    trainer.finish(seed=1)
    return trainer


@dataclass
class Run:
    """A copy of that run with its images, which tests may damage."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def latents(self) -> Path:
        return self.output / "cache" / "latents"

    @property
    def shard(self) -> Path:
        """The largest shard."""
        return max(self.latents.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def tool(self, *words: str) -> tuple[int, str]:
        """The exit code, and everything that was printed."""
        self.capture.readouterr()
        code = main([words[0], f"--output_dir={self.output}", *words[1:]])
        said = self.capture.readouterr()
        return code, said.out + said.err

    def change_settings(self, **values: Any) -> None:
        content = json.loads((self.output / "config.json").read_text())
        for name, value in values.items():
            content["settings"][name]["value"] = value
            for dataset in content["datasets"]:
                dataset.update({name: value} if name in dataset else {})
        (self.output / "config.json").write_text(json.dumps(content))

    def flip_a_byte(self, name: str) -> None:
        """Change one byte of an image's latents."""
        code, said = self.tool("why", name)
        assert code == 0, said
        shard, place = said.partition("  shard     ")[2].splitlines()[0].split(", ", 1)
        at = int(place.rpartition(" ")[2].replace(",", "")) + 11
        data = bytearray(Path(shard).read_bytes())
        data[at] ^= 1
        Path(shard).write_bytes(data)


@pytest.fixture
def run(original: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    folder = tmp_path / "copy"
    shutil.copytree(original.folder, folder)
    for path in (folder / "out" / "config.json", folder / "dataloader.json"):
        path.write_text(path.read_text().replace(str(original.folder), str(folder)))
    return Run(folder, capsys)


def content(folder: Path) -> dict[str, bytes]:
    """Every file, except those that SQLite keeps next to an open database."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_it_explains_itself_in_less_than_a_second() -> None:
    words = [sys.executable, "-X", "importtime", "toolkit/commands.py", "cache", "--help"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(command in ended.stdout for command in ("verify", "why", "gc", "stats", "export"))
    assert "torch" not in ended.stderr


# -- verify -------------------------------------------------------------------------------------------------------------------


def test_a_sound_cache_verifies_and_is_not_touched(run: Run) -> None:
    before = content(run.output / "cache")
    code, said = run.tool("verify")
    assert code == 0 and said.count("no problems") == 2
    assert "5 records in" in said  # the copy shares a record
    assert content(run.output / "cache") == before


def test_caches_are_found_by_their_folder_too(run: Run) -> None:
    for folder in (run.output / "cache", run.latents):
        run.capture.readouterr()
        assert main(["verify", f"--cache_dir={folder}"]) == 0
        assert "5 records" in run.capture.readouterr().out


def test_the_folder_of_a_cache_in_a_bucket_holds_copies_and_what_has_none_is_not_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, folder = MemoryBackend(), tmp_path / "cache" / "s3" / "bucket-0"
    cache = Cache(folder, RemoteShards(store, folder))
    with Writer(cache) as writer:
        for number in range(4):
            writer.add(record_key(str(number)), {"mean": torch.zeros(number + 1, 8)})
            writer.seal()
    cache.close()
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.unlink()

    assert main(["verify", f"--cache_dir={tmp_path / 'cache'}"]) == 0
    said = capsys.readouterr().out
    assert "4 records in 4 shards" in said and "no problems" in said
    assert "not read, because there is no local copy: 1 of the 4 shards in memory; with --output_dir of a run that" in said
    assert main(["stats", f"--cache_dir={folder}"]) == 0
    assert re.search(r"shards +4, 0\.00 MB in memory; local copies of 3, 0\.00 MB", capsys.readouterr().out)

    second.write_bytes(second.read_bytes()[:-1])  # a copy that is here is verified
    assert main(["verify", f"--cache_dir={folder}"]) == 1
    assert f"{second} has " in capsys.readouterr().out


def cut_off(run: Run) -> None:
    os.truncate(run.shard, run.shard.stat().st_size - 1)


def remove(run: Run) -> None:
    run.shard.unlink()


def break_header(run: Run) -> None:
    data = bytearray(run.shard.read_bytes())
    data[8:12] = b"}}}}"
    run.shard.write_bytes(data)


def lie_in_the_index(run: Run) -> None:
    with closing(sqlite3.connect(run.latents / INDEX)) as index, index:
        index.execute("UPDATE records SET offset = offset + 8")


def flip_layouts_of_records(run: Run) -> None:
    with closing(sqlite3.connect(run.latents / INDEX)) as index, index:
        index.execute("UPDATE records SET layout = layout + 1")


def flip_a_layout(run: Run) -> None:
    with closing(sqlite3.connect(run.latents / INDEX)) as index, index:
        index.execute("UPDATE layouts SET layout = replace(layout, 'mean', 'lean')")


def flip_a_layout_out_of_its_encoding(run: Run) -> None:
    with closing(sqlite3.connect(run.latents / INDEX)) as index, index:
        index.execute("UPDATE layouts SET layout = CAST(x'fffe' AS TEXT) WHERE number = (SELECT min(number) FROM layouts)")


def lose_the_index(run: Run) -> None:
    (run.latents / INDEX).write_bytes(b"this is no database" * 1000)
    for suffix in ("-wal", "-shm"):
        (run.latents / (INDEX + suffix)).unlink(missing_ok=True)


def forget_a_shard(run: Run) -> None:
    with closing(sqlite3.connect(run.latents / INDEX)) as index, index:
        (number,) = index.execute("SELECT number FROM shards WHERE name = ?", (run.shard.name,)).fetchone()
        index.execute("DELETE FROM records WHERE shard = ?", (number,))
        index.execute("DELETE FROM shards WHERE number = ?", (number,))


def leave_unfinished(run: Run) -> None:
    shutil.copy(run.shard, run.latents / f"{'9' * 20}-0-1-0.safetensors.tmp")


def flip(run: Run) -> None:
    run.flip_a_byte("images/a_red_circle_03.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "has changed since it was written"),
        (cut_off, "bytes instead of"),
        (remove, "is missing; it held"),
        (break_header, "its header is damaged"),
        (lie_in_the_index, "is not at the position in the index"),
        (flip_layouts_of_records, "has a damaged entry in the index; the next run encodes it again"),
        (flip_a_layout, "a layout has changed since it was written"),
        (flip_a_layout_out_of_its_encoding, "a layout has changed since it was written"),
        (lose_the_index, "the next run rebuilds it from the shards"),
        (forget_a_shard, "is not in the index; the next run adds its"),
        (leave_unfinished, "was never finished; the next run deletes it"),
    ],
)
def test_damage_is_listed_by_file_and_nothing_is_repaired_in_passing(run: Run, damage: Callable[[Run], None], words: str) -> None:
    damage(run)
    before = content(run.latents)
    code, said = run.tool("verify")
    assert code == 1 and words in said and str(run.latents) in said
    assert "text" in said and said.count("no problems") == 1  # the other cache is sound
    assert content(run.latents) == before


@pytest.mark.parametrize("damage", [flip_layouts_of_records, flip_a_layout, flip_a_layout_out_of_its_encoding])
def test_an_index_with_damaged_layouts_is_explained_by_every_command(run: Run, damage: Callable[[Run], None]) -> None:
    damage(run)
    code, said = run.tool("why", "a_copy.png")
    assert code == 1 and ("is damaged: the next start encodes it again" in said or "a layout has changed since it was written" in said)
    code, said = run.tool("stats")
    assert "unknown, because the entry in the index is damaged" in said or (code == 2 and "a layout has changed" in said)
    assert run.tool("export", "a_copy.png", str(run.folder / "out.png"))[0] == 2


def test_a_flipped_byte_has_that_entry_alone_made_again(run: Run, original: Trainer) -> None:
    """In the middle of a run, which reads each record as it needs it; afterwards the cache is sound."""
    run.flip_a_byte("images/a_red_circle_03.png")
    code, said = run.tool("why", "images/a_red_circle_03.png")
    assert code == 1 and "is damaged: the next start encodes it again" in said
    others = [f"images/a_red_circle_{number:02}.png" for number in (0, 1, 2, 4)]
    places = {name: run.tool("why", name)[1] for name in others}
    again = Trainer(run.images, run.folder, settings=original.settings).finish(seed=1, max_train_steps=4)
    assert "that of images/a_red_circle_03.png; it is encoded again" in again.printed
    assert run.tool("verify")[0] == 0
    assert run.tool("why", "images/a_red_circle_03.png")[0] == 0
    assert {name: run.tool("why", name)[1] for name in others} == places


# -- why ----------------------------------------------------------------------------------------------------------------------


def test_a_picture_is_named_by_path_by_key_or_by_data_set_and_key(run: Run) -> None:
    answers = [run.tool("why", name) for name in (str(run.images / "a_copy.png"), "a_copy.png", "images/a_copy.png")]
    assert answers[0] == answers[1] == answers[2]
    code, said = answers[0]
    assert code == 0 and "is current: the next start uses this entry" in said
    for words in ("  image     ", "  encoder   ", "  geometry  64x64 0,0 64x64", "  precision auto", "  shard     ", "mean 4x"):
        assert words in said


def test_what_changed_is_named(run: Run) -> None:
    run.change_settings(cache_dtype="fp32")
    code, said = run.tool("why", "a_copy.png")
    assert code == 1 and "with other settings or files (other cache precision)" in said and "earlier   precision auto" in said
    run.change_settings(cache_dtype="auto", resolution=72)
    assert "with other settings or files (other size or crop)" in run.tool("why", "a_copy.png")[1]
    run.change_settings(resolution=64)
    assert run.tool("why", "a_copy.png")[0] == 0


def test_a_picture_that_was_replaced_is_told_without_touching_the_runs_catalogue(run: Run) -> None:
    Image.new("RGB", (64, 64), "teal").save(run.images / "a_red_circle_04.png")
    catalogue = (run.output / "cache" / "catalogue.sqlite").read_bytes()
    code, said = run.tool("why", "a_red_circle_04.png")
    assert code == 1 and "with other settings or files (changed image" in said
    assert (run.output / "cache" / "catalogue.sqlite").read_bytes() == catalogue


def test_a_file_that_is_left_out_says_why(run: Run) -> None:
    (run.images / "notes.md").write_text("x")
    code, said = run.tool("why", "notes.md")
    assert code == 1 and "notes.md of dataset images is left out: not an image" in said


def test_a_new_picture_was_never_encoded(run: Run) -> None:
    Image.new("RGB", (64, 64), "teal").save(run.images / "new_one.png")
    code, said = run.tool("why", "new_one.png")
    assert code == 1 and "is not in the cache: it was never encoded" in said


@pytest.mark.parametrize("words", [("why", "nothing.png"), ("export", "nothing.png", "out.png")])
def test_a_file_of_no_data_set_is_refused(run: Run, words: tuple[str, ...]) -> None:
    code, said = run.tool(*words)
    assert code == 2 and "nothing.png is not a file of the run's datasets (images)" in said


@pytest.mark.parametrize("command", ["verify", "stats", "gc"])
def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, f"--output_dir={tmp_path}"]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_latents_of_a_set_that_is_cut_anew_each_epoch_are_those_of_the_present_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(draw_images(tmp_path / "images", 5), tmp_path, settings=SETTINGS)
    trainer.dataloader(vae_cache_clear_each_epoch=True)  # random cuts and mirroring
    trainer.finish(max_train_steps=8, gradient_accumulation_steps=1)
    run = Run(tmp_path, capsys)
    epoch, folder = min((int(path.name.rpartition("-")[2]), path) for path in run.latents.iterdir())  # the next one may be there
    assert epoch >= 1
    code, said = run.tool("why", "a_red_circle_03.png")
    assert code == 0 and f"dataset images, with its crop of epoch {epoch}, is current" in said and str(folder) in said
    assert run.tool("export", "a_red_circle_03.png", str(tmp_path / "out.png"))[0] == 0
    before = content(run.latents)
    for words in (("gc",), ("gc", "--delete")):  # these go with the run's epochs
        code, said = run.tool(*words)
        assert code == 0 and said.startswith("0 records")
    assert content(run.latents) == before


# -- gc -----------------------------------------------------------------------------------------------------------------------


def test_what_every_plan_needs_stays(run: Run) -> None:
    before = content(run.output / "cache")
    code, said = run.tool("gc")
    assert code == 0 and said.startswith("0 records")
    assert content(run.output / "cache") == before


def test_records_of_pictures_that_are_gone_go_and_the_rest_reads_the_same(run: Run) -> None:
    kept = {name: said for name in ("a_copy.png", "a_red_circle_01.png") if (said := record(run, name))}
    for number in (2, 3):
        (run.images / f"a_red_circle_{number:02}.png").unlink()
    for foreign in ("holiday.safetensors", "notes.txt"):
        (run.latents / foreign).write_text("mine")
    before = content(run.latents)
    code, said = run.tool("gc")
    assert code == 0 and re.search(r"^4 records, .* not needed; --delete deletes them$", said, re.MULTILINE)  # and two captions
    assert content(run.latents) == before  # without --delete nothing changes
    images, bytes_before = content(run.images), on_disk(run.latents)
    code, said = run.tool("gc", "--delete")
    assert code == 0 and said.rstrip().endswith("MB deleted")
    assert on_disk(run.latents) < bytes_before and content(run.images) == images
    assert (run.latents / "holiday.safetensors").read_text() == (run.latents / "notes.txt").read_text() == "mine"
    assert run.tool("verify")[0] == 0 and "3 records in" in run.tool("verify")[1]
    assert {name: record(run, name) for name in kept} == kept
    assert run.tool("gc")[1].startswith("0 records")


def test_the_negative_prompt_of_pictures_that_begin_with_pictures_stays(run: Run) -> None:
    """Validation from images of the data asks for the negative prompt, even where there is no prompt."""
    (run.images / "a_red_circle_02.png").unlink()
    assert "\n2 records," in run.tool("gc")[1]  # its latents, and its caption
    run.change_settings(validation_using_datasets=True, validation_negative_prompt="a red circle 02")
    assert "\n1 records," in run.tool("gc")[1]


def record(run: Run, name: str) -> list[float]:
    """The latents of an image."""
    code, said = run.tool("why", name)
    assert code == 0, said
    cache = Cache(run.latents)
    try:
        found = cache.get(bytes.fromhex(said.partition("  key       ")[2].split()[0]))
    finally:
        cache.close()
    assert found is not None
    return found["mean"].flatten().tolist()


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_shards_that_nobody_knows_go(run: Run) -> None:
    leave_unfinished(run)
    stray = run.latents / f"{'8' * 20}-0-1-0.safetensors"
    shutil.copy(run.shard, stray)
    assert "records, " in run.tool("gc")[1]
    assert run.tool("gc", "--delete")[0] == 0
    assert not stray.exists() and not list(run.latents.glob("*.tmp"))
    assert run.tool("verify")[0] == 0 and record(run, "a_copy.png")


def test_a_shard_that_a_run_would_take_in_is_not_surplus(run: Run) -> None:
    shard = run.shard
    forget_a_shard(run)
    assert run.tool("gc")[1].startswith("0 records")
    run.tool("gc", "--delete")
    assert shard.exists() and run.tool("verify")[0] == 0


def test_nothing_goes_where_not_one_needed_record_is_there(run: Run) -> None:
    """As on another device, or with another model, whose fingerprints differ."""
    run.change_settings(resolution=72)
    before = content(run.output / "cache")
    code, said = run.tool("gc", "--delete")
    assert code == 2 and "the runs need 5 records, and none of them is among" in said
    assert content(run.output / "cache") == before


def test_a_cache_in_use_is_not_cleaned_up(run: Run) -> None:
    (run.images / "a_red_circle_02.png").unlink()
    cache = Cache(run.latents)
    try:
        code, said = run.tool("gc", "--delete")
        assert code == 2 and "the cache is in use by a run" in said
    finally:
        cache.close()
    assert run.tool("gc", "--delete")[0] == 0


def test_a_shared_cache_keeps_what_the_other_named_run_needs(run: Run) -> None:
    """`other` trains on one of the images, from a folder of its own."""
    other, fewer = run.folder / "other", run.folder / "fewer"
    shutil.copytree(run.output, other, ignore=shutil.ignore_patterns("checkpoint-*", "latents", "text"))
    fewer.mkdir()
    shutil.copy(run.images / "a_red_circle_01.png", fewer)
    settings = (other / "config.json").read_text().replace(str(run.images), str(fewer))
    (other / "config.json").write_text(settings.replace(f'"{run.output / "cache"}"', f'"{other / "cache"}"'))
    run.capture.readouterr()
    assert main(["gc", f"--output_dir={other}"]) == 0
    assert "9 records" in run.capture.readouterr().out  # four latents, five captions
    assert main(["gc", f"--output_dir={other}", f"--output_dir={run.output}"]) == 0
    assert run.capture.readouterr().out.startswith("0 records")


# -- stats and export -----------------------------------------------------------------------------------------------------------


def test_stats_count_records_shapes_and_encoders(run: Run) -> None:
    code, said = run.tool("stats")
    assert code == 0
    for words in ("records   5, ", "shape     mean 4x", "prompt_embeds 77x", "precision auto: the latest record of 6 images"):
        assert words in said


def test_a_cached_latent_becomes_a_picture_that_resembles_its_source(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    code, said = run.tool("export", "a_red_circle_00.png", str(target))
    assert code == 0 and said.strip().endswith("64x64")
    with Image.open(target) as decoded:
        shown = np.asarray(decoded.convert("RGB"), float)
    distances = {}
    for path in run.images.glob("a_red_circle_*.png"):
        with Image.open(path) as source:
            distances[path.name] = np.abs(shown - np.asarray(source.convert("RGB").resize((64, 64)), float)).mean()
    assert min(distances, key=lambda name: distances[name]) == "a_red_circle_00.png", distances


def test_a_picture_that_is_not_cached_cannot_be_exported(run: Run, tmp_path: Path) -> None:
    run.change_settings(cache_dtype="fp32")
    code, said = run.tool("export", "a_copy.png", str(tmp_path / "out.png"))
    assert code == 2 and "other cache precision" in said and not (tmp_path / "out.png").exists()


# -- the settings of a run --------------------------------------------------------------------------------------------------------


def test_saved_settings_come_back_as_they_were(run: Run) -> None:
    config = read_saved_config(run.output, known_axes())
    assert config.to_json() == json.loads((run.output / "config.json").read_text())
    assert isinstance(config.run.output_dir, Path) and isinstance(config.reporting.report_to, tuple)
    assert isinstance(config.datasets[0].instance_data_dir, Path)


def everything(folder: Path) -> Path:
    """A dataloader file with every kind of value that an entry can hold."""
    (folder / "images").mkdir()
    store = {"type": "aws", "aws_bucket_name": "bucket", "aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    path = folder / "dataloader.json"
    images = {"instance_data_dir": str(folder / "images")}
    entries = [
        {"id": "shapes", **images, "crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, {"aspect": 1.5, "weight": 2}]},
        {"id": "table", **images, "caption_strategy": "csv", "csv": {"path": str(folder / "a.csv")}, "text_embeds": "here"},
        {"id": "stored", **store, "cache_dir_vae": "latents", "aws_data_prefix": "images"},
        {"id": "tars", "type": "webdataset", "urls": [str(folder / "1.tar")]},
        {"id": "texts", "dataset_type": "text_embeds", **store, "aws_data_prefix": "texts", "default": True},
        {"id": "here", "dataset_type": "text_embeds", "cache_dir": str(folder), "caption_filter_list": ["s/a/b/"]},
    ]
    for name in ("a.csv", "1.tar"):
        (folder / name).touch()
    path.write_text(json.dumps(entries))
    return path


def test_every_kind_of_setting_comes_back_and_keys_of_buckets_from_the_dataloader_file(tmp_path: Path) -> None:
    dataloader = everything(tmp_path)
    flags = {"pretrained_model_name_or_path": "model", "data_backend_config": dataloader, "output_dir": tmp_path, "resolution": 0.5}
    (tmp_path / "aspect_resolution_map-0.5.json").write_text('{"1.5": [128, 64]}')
    config = read_config([f"--{name}={value}" for name, value in flags.items()], {}, known_axes())
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert SECRET not in (tmp_path / "config.json").read_text()
    read = read_saved_config(tmp_path, known_axes())
    assert read.datasets == config.datasets and read.text_caches == config.text_caches

    dataloader.write_text(dataloader.read_text().replace('"bucket"', '"another"'))
    assert {entry.aws_secret_access_key for entry in (*read_saved_config(tmp_path, known_axes()).datasets, read.datasets[0])} == {None}
    dataloader.unlink()
    assert {entry.aws_secret_access_key for entry in read_saved_config(tmp_path, known_axes()).datasets} == {None}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}}'])
def test_settings_of_another_version_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        read_saved_config(tmp_path, known_axes())
