"""Preparing data from buckets, behind a proxy that fails: what is found is what is there, and faults are told or sat out."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.config.dataloader import read_dataloader
from helpers.config.datasets import TextCacheConfig
from helpers.config.options import OPTIONS
from helpers.data.base import prefetch as reading_ahead
from helpers.data.base.prefetch import made_in_threads, read_ahead
from helpers.data.base.workers import Workers
from helpers.data.prepare import prepare_data
from helpers.data.training_data import TrainingData
from helpers.errors import DataError, StorageError
from helpers.storage import s3 as s3_module
from helpers.storage.retrying import Patience
from tests.data.toys import ConvCodec, HashEncoders, Story, ToyFamily, dataset, picture, pictures, settings
from tests.storage.fault_proxy import FaultProxy, Request, fault_proxy
from tests.storage.memory import MemoryBackend
from tests.storage.s3_server import KEY, SECRET, S3Server

PATIENT = Patience(deadline=300, first_deadline=300, pause=0.02, longest_pause=0.1)
THRICE = Patience(deadline=300, first_deadline=300, pause=0.02, longest_pause=0.1, budget=3)  # gives up after three tries


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as between:
        yield between


class Bucket:
    """Ten pictures with captions below `data/` of a bucket, and how to prepare them."""

    def __init__(self, s3: S3Server, proxy: FaultProxy, folder: Path) -> None:
        self.name = s3.new_bucket()
        self.s3, self.proxy, self.folder = s3, proxy, folder
        self.patience = PATIENT
        s3.put_folder(self.name, "data", pictures(folder / "pictures"))
        self.keys = {
            "aws_bucket_name": self.name,
            "aws_endpoint_url": proxy.url,
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
        }

    def prepare(
        self, machine: str = "machine", family: ToyFamily | None = None, story: Story | None = None, **changed: Any
    ) -> TrainingData:
        keys = {"type": "aws", **self.keys}
        limit = changed.get("cache_local_limit_gb")
        texts = TextCacheConfig(id="texts", aws_data_prefix="caches/text", default=True, cache_local_limit_gb=limit, **keys)
        entry = dataset(Path(), self.folder, aws_data_prefix="data", latents_prefix="caches/latents", text_entry=texts, **keys, **changed)
        (self.folder / machine).mkdir(exist_ok=True)
        return prepare_data([entry], settings(self.folder / machine), family or ToyFamily(), Workers(), story or Story())  # type: ignore[arg-type]


@pytest.fixture
def bucket(s3: S3Server, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket(s3, proxy, tmp_path)
    monkeypatch.setattr(s3_module, "Patience", lambda: bucket.patience)
    return bucket


def of_steps(data: TrainingData, count: int = 8) -> list[tuple[tuple[str, ...], torch.Tensor, dict[str, torch.Tensor]]]:
    return [(batch.captions, batch.latents, batch.text) for [batch] in data.steps(0, count)]


def equal(one: Any, other: Any) -> bool:
    return all(
        captions == others and torch.equal(latents, other_latents) and all(torch.equal(text[name], other_text[name]) for name in text)
        for (captions, latents, text), (others, other_latents, other_text) in zip(one, other, strict=True)
    )


def test_a_bucket_gives_the_batches_of_a_folder_also_to_another_machine_with_little_room(bucket: Bucket, tmp_path: Path) -> None:
    local = prepare_data([dataset(tmp_path / "pictures", tmp_path / "local")], settings(tmp_path / "out"), ToyFamily(), Workers(), Story())  # type: ignore[arg-type]
    expected = of_steps(local)
    before = bucket.s3.contents(bucket.name, "data/")
    assert equal(of_steps(bucket.prepare()), expected)
    family = ToyFamily(ConvCodec(), HashEncoders())
    assert equal(of_steps(bucket.prepare("other", family, cache_local_limit_gb=1e-8)), expected)
    assert family.codec.batches == [] and family.encoders.encoded == []
    assert not list((tmp_path / "other").rglob("*-*-*-*.safetensors"))
    assert bucket.s3.contents(bucket.name, "data/") == before


def test_a_prefix_inside_another_and_folders_of_kohya_are_told(bucket: Bucket, tmp_path: Path) -> None:
    data = (tmp_path / "pictures" / "picture_00.png").read_bytes()
    bucket.s3.put(bucket.name, {"kohya/10_sks dog/a.png": data, "kohyas/a.png": data})  # the second begins alike, and is not inside
    story = Story()
    entries = [
        dataset(Path(), tmp_path, id=prefix, type="aws", aws_data_prefix=prefix, caption_strategy="filename", **bucket.keys)
        for prefix in ("kohya", "kohya/10_sks dog", "kohyas")
    ]
    prepare_data(entries, settings(tmp_path / "out"), ToyFamily(), Workers(), story)  # type: ignore[arg-type]
    [told] = [line for line in story.lines if " are also in " in line]
    assert "1 of 1 images of kohya are also in kohya/10_sks dog" in told
    assert f"s3://{bucket.name}/kohya/10_sks dog is inside s3://{bucket.name}/kohya" in told
    [line] = [line for line in story.lines if "kohya's scripts" in line]
    assert 'write an entry for each, such as "aws_data_prefix": "kohya/10_sks dog" with "repeats": 9' in line


def test_the_resolutions_of_an_entry_share_a_cache_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    """Their ids have an @. Another machine finds the latents of both."""
    keys = {**bucket.keys, "type": "aws", "aws_data_prefix": "few", "caption_strategy": "filename", "cache_dir_vae": "caches/vae"}
    bucket.s3.put(
        bucket.name, {f"few/{name}": (tmp_path / "pictures" / name).read_bytes() for name in ("picture_00.png", "picture_01.png")}
    )
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{**keys, "id": "toys", "resolution": [64, 32], "resolution_type": "pixel", "minimum_image_size": 0}]))
    found = read_dataloader(file, {name: item.default for name, item in OPTIONS.items()})
    assert found.problems == () and [each.id for each in found.datasets] == ["toys@64", "toys@32"]
    for machine, wanted in ("one", "4 encoded"), ("other", "4 cached"):
        story = Story()
        entries = [dataclasses.replace(each, text_cache_dir=tmp_path / machine / "text") for each in found.datasets]
        (tmp_path / machine).mkdir()
        prepare_data(entries, settings(tmp_path / machine), ToyFamily(), Workers(), story)  # type: ignore[arg-type]
        assert any(line.startswith("latents: 4 needed") and wanted in line for line in story.lines), story.lines
    assert all(re.fullmatch(r"[a-zA-Z0-9!_.*'()/-]+", key) for key in bucket.s3.contents(bucket.name, "caches/"))  # safe in every store


def test_conditions_in_a_bucket_are_those_of_a_folder(bucket: Bucket, tmp_path: Path) -> None:
    edges = tmp_path / "edges"
    for place in (tmp_path / "pictures").glob("*.png"):
        edges.mkdir(exist_ok=True)
        Image.open(place).rotate(180).save(edges / place.name)
    bucket.s3.put_folder(bucket.name, "edges", edges)
    plain: dict[str, Any] = {"id": "edges", "caption_strategy": "instanceprompt", "instance_prompt": "a condition"}
    there = dataset(Path(), tmp_path, type="aws", aws_data_prefix="edges", **bucket.keys, **plain)
    here = dataset(edges, tmp_path, **plain)
    family = ToyFamily()
    family.condition_as_latents = False  # type: ignore[attr-defined]
    entry = dataset(tmp_path / "pictures", tmp_path / "local", condition=here)
    local = prepare_data([entry], settings(tmp_path / "out"), family, Workers(), Story())  # type: ignore[arg-type]
    expected = [batch.condition for [batch] in local.steps(0, 8)]
    found = [batch.condition for [batch] in bucket.prepare(family=family, condition=there).steps(0, 8)]
    assert all(one is not None and other is not None and torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_warm_start_asks_for_two_listings_and_no_object(bucket: Bucket) -> None:
    bucket.prepare()
    bucket.proxy.asked.clear()
    bucket.prepare()
    assert [request.query.get("prefix") for request in bucket.proxy.asked] == [["data/"], ["caches/latents/"], ["caches/text/"]]


def test_a_picture_replaced_between_two_starts_or_in_the_middle_is_encoded_as_it_is(bucket: Bucket, tmp_path: Path) -> None:
    first = of_steps(bucket.prepare())
    one, other = (picture(tmp_path / f"new_{seed}.png", seed, (64, 96)).read_bytes() for seed in (98, 99))  # as large as before
    replaced: list[bool] = []

    def replace(request: Request) -> bool:
        """In the middle: between the scan, which reads headers, and the encoding, which reads whole files."""
        if request.path.endswith("picture_03.png") and not replaced and "range" not in request.headers:
            replaced.append(True)
            bucket.s3.put(bucket.name, {"data/picture_03.png": other})
        return False

    story = Story()
    bucket.s3.put(bucket.name, {"data/picture_00.png": one})
    bucket.proxy.fail("status", wants=replace)
    bucket.prepare(story=story)
    assert replaced
    assert [line for line in story.lines if "2 encoded" in line and "2 changed image" in line], story.lines
    family = ToyFamily(ConvCodec())
    changed = of_steps(bucket.prepare("fresh", family))
    assert family.codec.batches == [] and not equal(changed, first)
    assert equal(of_steps(bucket.prepare()), changed)


def test_an_upload_that_always_fails_ends_the_preparation(bucket: Bucket) -> None:
    bucket.patience = THRICE
    bucket.proxy.fail("status", wants=lambda request: request.method == "PUT")
    with pytest.raises(StorageError, match=r"caches/latents/ at .* could not be written: the store answered SlowDown \(HTTP 503\)"):
        bucket.prepare()
    bucket.proxy.heal()
    bucket.patience = PATIENT
    assert equal(of_steps(bucket.prepare()), of_steps(bucket.prepare("other")))


@pytest.mark.parametrize("kind", ["status", "short", "corrupt"])
def test_pictures_that_cannot_be_read_end_the_preparation_and_are_not_called_damaged(kind: str, bucket: Bucket) -> None:
    wants = {"header": lambda request: "range" in request.headers, "file": lambda request: "range" not in request.headers}
    part = "file" if kind == "corrupt" else "header"
    bucket.patience = THRICE
    bucket.proxy.fail(kind, wants=lambda request: request.path.endswith(".png") and wants[part](request))
    with pytest.raises(StorageError, match=r"s3://.*/data/ at .*: picture_\d\d.png could not be read"):
        bucket.prepare()
    bucket.proxy.heal()
    bucket.patience = PATIENT
    bucket.prepare()


def test_a_header_or_a_record_damaged_on_the_way_is_read_again(bucket: Bucket, s3: S3Server, tmp_path: Path) -> None:
    large = picture(tmp_path / "large.png", 7, (640, 640)).read_bytes()
    assert len(large) > 2**16
    bucket.s3.put(bucket.name, {"data/picture_00.png": large})
    header = bucket.proxy.fail("corrupt", wants=lambda request: request.path.endswith("picture_00.png"), times=1)
    expected = of_steps(bucket.prepare())
    family = ToyFamily(ConvCodec(), HashEncoders())
    data = bucket.prepare("other", family, cache_local_limit_gb=1e-8)
    record = bucket.proxy.fail("corrupt", wants=lambda request: "/caches/latents/" in request.path and request.method == "GET", times=1)
    assert equal(of_steps(data), expected)
    assert header.met == record.met == 1 and family.codec.batches == []


def test_an_empty_prefix_is_told_as_such(bucket: Bucket) -> None:
    for key in bucket.s3.contents(bucket.name):
        bucket.s3.client.delete_object(Bucket=bucket.name, Key=key)
    with pytest.raises(DataError, match=r"dataset 'toys': there are no files in s3://.*/data/ at .*; put images there"):
        bucket.prepare()


class Remote(MemoryBackend):
    """Answers as a network does: many at once, none before it is asked."""

    reads_at_once = 8

    def __init__(self, count: int, size: int) -> None:
        super().__init__({f"{number:03}": bytes([number % 256]) * size for number in range(count)})
        self.alive, self.most = 0, 0

    def read(self, key: str) -> bytes:
        data = super().read(key)
        self.alive += len(data)
        self.most = max(self.most, self.alive)
        return data


def test_files_are_read_ahead_within_bounds_and_handed_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_ahead, "BYTES_AHEAD", 10_000)
    monkeypatch.setattr(reading_ahead, "_FIRST_GUESS", 1000)
    source = Remote(200, 1000)
    keys = [entry.key for entry in source.list()]
    with read_ahead(source, keys) as ahead:

        def taken(key: str) -> bytes:
            data = ahead.read(key)
            source.alive -= len(data)
            return data

        assert [data[0] for data in made_in_threads(taken, keys, 4)] == list(range(200))
    assert source.most <= 10_000 + 5 * 1000  # and what the four have in their hands


def test_an_error_comes_in_its_place_and_leaving_early_is_possible() -> None:
    source = Remote(20, 10)
    source.delete("003")
    keys = [f"{number:03}" for number in range(20)]
    with read_ahead(source, keys) as ahead:
        assert ahead.read("000")
        assert ahead.read("002") and ahead.read("001")
        with pytest.raises(FileNotFoundError):
            ahead.read("003")
        assert ahead.read("004")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    with read_ahead(MemoryBackend({"a.png": stream.getvalue()}), ["a.png"]) as same:
        assert same.read("a.png") == same.read("a.png")
