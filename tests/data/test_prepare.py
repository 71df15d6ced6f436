"""From folders to batches: encoded once, encoded again only where something changed, whatever interrupts it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.data.base import images
from helpers.data.base.sample import Size
from helpers.data.base.workers import Workers
from helpers.data.batches import Batch
from helpers.data.cache import cache as cache_module
from helpers.data.cache.cache import Cache, Writer
from helpers.data.cache.shards import read_header
from helpers.data.prepare import prepare_data
from helpers.data.training_data import TrainingData
from helpers.errors import DataError, Interrupted, StorageError
from helpers.storage.local import LocalSource
from tests.data.toys import ConvCodec, HashEncoders, Story, ToyFamily, dataset, picture, pictures, settings, tree_hash


@dataclasses.dataclass
class Place:
    """A data folder and an output folder, and how to prepare the one into the other."""

    data: Path
    output: Path

    def prepare(
        self, family: ToyFamily | None = None, workers: Workers | None = None, story: Story | None = None, **changed: Any
    ) -> TrainingData:
        in_settings = {name: changed.pop(name) for name in list(changed) if name not in DATASET_KEYS}
        return prepare_data(
            [dataset(self.data, self.output / "cache", **changed)],
            settings(self.output, **in_settings),
            family or ToyFamily(),  # type: ignore[arg-type]  # as much of a family as data needs
            workers or Workers(),
            story or Story(),
        )

    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "dataset_report.json").read_text())["datasets"][0]


DATASET_KEYS = (
    "resolution",
    "crop",
    "crop_style",
    "crop_aspect",
    "crop_aspect_buckets",
    "aspects_stay",
    "repeats",
    "probability",
    "flip",
    "minimum_image_size",
    "vae_cache_clear_each_epoch",
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(pictures(tmp_path / "data"), tmp_path / "output")


def epoch(data: TrainingData) -> list[Batch]:
    return [batch for step in data.steps(0, data.micro_batches_per_epoch) for batch in step]


def latents(data: TrainingData) -> dict[str, Tensor]:
    return {sample.key: latent for batch in epoch(data) for sample, latent in zip(batch.samples, batch.latents, strict=True)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_epoch_holds_every_picture_with_its_latents_text_and_cut(place: Place) -> None:
    family = ToyFamily()
    batches = epoch(place.prepare(family))
    assert sorted(sample.key for batch in batches for sample in batch.samples) == [f"picture_{index:02}.png" for index in range(10)]
    for batch in batches:
        for index, (sample, geometry) in enumerate(zip(batch.samples, batch.geometry, strict=True)):
            assert batch.captions[index] == f"caption number {int(sample.key[8:10])}"
            expected = family.encoders.encode([batch.captions[index]])
            assert all(torch.equal(batch.text[name][index], expected[name][0]) for name in expected)
            pixels = images.crop(images.decode((place.data / sample.key).read_bytes()), geometry)
            assert torch.allclose(batch.latents[index], family.codec.net(pixels.unsqueeze(0))[0], atol=2e-2)


def test_a_second_start_encodes_nothing_and_opens_no_image(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.prepare()
    opened: list[str] = []
    read, open_stream = LocalSource.read, LocalSource.open
    monkeypatch.setattr(LocalSource, "read", lambda self, key: opened.append(key) or read(self, key))
    monkeypatch.setattr(LocalSource, "open", lambda self, key: opened.append(key) or open_stream(self, key))
    family, story = ToyFamily(), Story()
    second = place.prepare(family, story=story)
    assert not opened and not family.codec.batches and not family.encoders.encoded
    assert "latents: 10 needed, 10 cached" in story.lines and "text: 11 needed, 11 cached" in story.lines
    assert_same(latents(first), latents(second))
    assert first.fingerprint() == second.fingerprint()


def test_pictures_that_were_only_touched_or_renamed_keep_their_latents(place: Place) -> None:
    """The catalogue forgets them, the cache does not: they are read again, not encoded, and trained on as before."""
    before = latents(place.prepare())
    for index in range(10):
        os.utime(place.data / f"picture_{index:02}.png", (1, 1))
    for ending in ("png", "txt"):
        (place.data / f"picture_09.{ending}").rename(place.data / f"renamed.{ending}")
    family = ToyFamily()
    after = latents(place.prepare(family))
    assert not family.codec.batches
    assert_same(after, {key.replace("picture_09", "renamed"): latent for key, latent in before.items()})


def test_nothing_is_written_into_the_data_folder(place: Place) -> None:
    before = tree_hash(place.data)
    epoch(place.prepare())
    assert tree_hash(place.data) == before


def changed_image(place: Place) -> dict[str, Any]:
    path = place.data / "picture_04.png"
    stat = path.stat()
    picture(path, seed=99)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    return {}


def changed_caption(place: Place) -> dict[str, Any]:
    (place.data / "picture_03.txt").write_text("something else entirely")
    return {}


def added_image(place: Place) -> dict[str, Any]:
    picture(place.data / "zebra.png", 50, caption="a zebra")
    return {}


CHANGES: list[tuple[str, Callable[[Place], dict[str, Any]], str, str]] = [
    ("image", changed_image, "latents: 10 needed, 9 cached; 1 encoded", "1 changed image"),
    ("caption", changed_caption, "text: 11 needed, 10 cached; 1 encoded", "1 new"),
    ("added", added_image, "latents: 11 needed, 10 cached; 1 encoded", "1 new"),
    ("vae", lambda place: {"family": ToyFamily(ConvCodec(seed=1))}, "latents: 10 needed, 0 cached; 10 encoded", "10 other encoder"),
    ("text encoders", lambda place: {"family": ToyFamily(encoders=HashEncoders(1))}, "text: 11 needed, 0 cached; 11", "11 other encoder"),
    ("resolution", lambda place: {"resolution": 32}, "latents: 10 needed, 0 cached; 10 encoded", "10 other size or crop"),
    ("precision", lambda place: {"cache_dtype": "fp16"}, "latents: 10 needed, 0 cached; 10 encoded", "10 other cache precision"),
    ("prompt", lambda place: {"extra_captions": ("a prompt",)}, "text: 12 needed, 11 cached; 1 encoded", "1 new"),
]


@pytest.mark.parametrize(("change", "begins", "ends"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_a_change_encodes_again_just_what_it_must_and_says_so(
    place: Place, change: Callable[[Place], dict[str, Any]], begins: str, ends: str
) -> None:
    place.prepare()
    changed, story = change(place), Story()
    data = place.prepare(story=story, **changed)
    assert any(line.startswith(begins) and line.endswith(f": {ends}") for line in story.lines), story.lines
    fresh = latents(Place(place.data, place.output / "fresh").prepare(**changed))
    found = latents(data)
    assert found.keys() == fresh.keys()
    assert all(torch.allclose(found[key], fresh[key], atol=2e-2) for key in found)  # beside other batch-mates: not bit for bit


def test_going_back_to_earlier_settings_encodes_nothing(place: Place) -> None:
    place.prepare()
    place.prepare(resolution=32)
    family = ToyFamily()
    place.prepare(family)
    assert not family.codec.batches


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (changed_image, {"images"}),
        (changed_caption, {"captions"}),
        (added_image, {"images", "captions", "plan"}),
        (lambda place: {"resolution": 32}, {"plan"}),
        (lambda place: {"repeats": 1}, {"repeats"}),
        (lambda place: {"probability": 2.0}, {"mix"}),
        (lambda place: {"family": ToyFamily(ConvCodec(seed=1))}, {"image_codec"}),
        (lambda place: {"extra_captions": ("a prompt",)}, set()),
    ],
)
def test_the_fingerprint_names_what_changed(place: Place, change: Callable[[Place], dict[str, Any]], names: set[str]) -> None:
    before = place.prepare().fingerprint()
    after = place.prepare(**change(place)).fingerprint()
    assert {name for name in before if before[name] != after[name]} == names


def test_equal_captions_are_encoded_once(place: Place) -> None:
    for path in place.data.glob("*.txt"):
        path.write_text("the same for all")
    family = ToyFamily()
    place.prepare(family, extra_captions=("a prompt", "a prompt"))
    assert sorted(family.encoders.encoded) == ["", "a prompt", "the same for all"]


def test_the_text_of_prompts_and_the_unconditional_are_at_hand(place: Place) -> None:
    data = place.prepare(extra_captions=("a prompt",))
    expected = HashEncoders().encode(["a prompt", ""])
    assert torch.equal(data.text("a prompt")["states"], expected["states"][0])
    assert torch.equal(data.text("")["pooled"], expected["pooled"][1])
    assert not data.unconditional["states"].any()
    with pytest.raises(DataError, match="never asked for"):
        data.text("never asked for")


def test_undecodable_pictures_are_listed_and_the_rest_is_trained_on(place: Place) -> None:
    whole = (place.data / "picture_04.png").read_bytes()
    (place.data / "picture_04.png").write_bytes(whole[: len(whole) // 2])
    story = Story()
    data = place.prepare(story=story)
    assert "picture_04.png" not in latents(data) and len(latents(data)) == 9
    report = place.report()
    assert (report["found"], report["used"]) == (10, 9) and sum(report["buckets"].values()) == 9
    assert report["left_out"][0]["key"] == "picture_04.png" and report["left_out"][0]["reason"].startswith("unreadable")
    assert any("1 more left out, found while encoding" in line for line in story.lines)
    again = place.prepare()  # the next start leaves it out of the plan; for a run that is resumed nothing changes
    assert again.fingerprint() == data.fingerprint() and place.report()["left_out"] == report["left_out"]
    assert [batch.samples for batch in epoch(again)] == [batch.samples for batch in epoch(data)]
    assert_same(latents(again), latents(data))


def test_a_data_set_of_which_nothing_can_be_encoded_is_refused(place: Place) -> None:
    for path in place.data.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="'toys': none of its 10 images .* could be encoded; picture_00.png: unreadable"):
        place.prepare()


class Overflowing(ConvCodec):
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        latents = super().encode(pixels)
        latents["mean"][0] *= 1e9
        return latents


def test_latents_beyond_the_range_of_the_cache_are_left_out_and_told(place: Place) -> None:
    data = place.prepare(ToyFamily(Overflowing()), cache_dtype="fp16", vae_batch_size=100)
    assert len(latents(data)) == 8  # the first of each shape's batch does not fit
    assert all(entry["reason"].startswith("not finite") for entry in place.report()["left_out"])


class Small(ConvCodec):
    """A codec on a device with room for two images."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        if len(pixels) > 2:
            raise self.error
        return super().encode(pixels)


def test_a_batch_that_does_not_fit_is_halved_and_everything_is_cached(place: Place) -> None:
    codec = Small()
    data = place.prepare(ToyFamily(codec), vae_batch_size=5)
    assert len(latents(data)) == 10 and max(codec.batches) == 2


def test_a_batch_is_halved_on_a_device_that_says_it_in_its_own_words(place: Place) -> None:
    codec = Small()
    codec.error = RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
    data = place.prepare(ToyFamily(codec), vae_batch_size=5)
    assert len(latents(data)) == 10 and max(codec.batches) == 2


def damage(output: Path, folder: str) -> None:
    """Flip a bit in every record, here and there, of all shards in a cache folder."""
    for shard in (output / "cache" / folder).glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        for offset in range(header + 50, len(data), 100):
            data[offset] ^= 1
        shard.write_bytes(data)


@pytest.mark.parametrize("folder", ["latents", "text"])
def test_damaged_records_are_encoded_again_while_training_and_named(place: Place, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = epoch(place.prepare(caption_dropout=0.3))
    damage(place.output, folder)
    data = place.prepare(caption_dropout=0.3)
    for batch, right in zip(epoch(data), expected, strict=True):
        assert torch.equal(batch.latents, right.latents)
        assert all(torch.equal(batch.text[name], right.text[name]) for name in right.text)
    assert "encoded again" in caplog.text and ("toys/picture_" if folder == "latents" else "caption number") in caplog.text


def test_pictures_of_validation_have_the_captions_that_training_drops(place: Place) -> None:
    data = place.prepare(caption_dropout=1.0)
    with contextlib.closing(data.steps(0, 2, keep_captions=True)) as steps:
        shown = [batch for step in steps for batch in step]
    assert all(batch.captions and all(batch.captions) and not any(batch.dropped) for batch in shown)
    assert all(all(batch.dropped) for batch in epoch(data))


def test_latents_that_are_not_finite_are_never_trained_on(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    expected = latents(place.prepare())
    cache = Cache(place.output / "cache" / "latents")
    (shard,) = cache.folder.glob("*.safetensors")
    keys = [record.key for record in read_header(shard)]
    for key in keys:
        cache.discard(key)
    with Writer(cache) as writer:
        for key in keys:
            writer.add(key, {"mean": torch.full((4, 8, 12), torch.nan)})
    before = tree_hash(place.data)
    assert_same(latents(place.prepare()), expected)
    assert "not finite" in caplog.text and tree_hash(place.data) == before


def test_a_full_disk_while_caching_stops_the_run_and_what_was_sealed_is_used(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 4000)  # two records and a bit
    fsync, sealed = os.fsync, []

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            sealed.append(descriptor)
            if len(sealed) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="latents: the cache cannot be written: No space left"):
        patch.setattr(os, "fsync", full)
        place.prepare()
    story = Story()
    place.prepare(story=story)
    told = next(line for line in story.lines if line.startswith("latents"))
    assert re.match(r"latents: 10 needed, [3-9] cached; ", told), told


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_cannot_be_made_durable_stops_the_run_and_has_no_row_in_the_index(
    place: Place, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(os, call)

    def failing(what: Any, *rest: Any) -> None:
        name = str(what) if call == "replace" else os.readlink(f"/proc/self/fd/{what}")
        if "/latents/" in name and name.endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        whole(what, *rest)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="latents: the cache cannot be written: Input/output error"):
        patch.setattr(os, call, failing)
        place.prepare()
    folder = place.output / "cache" / "latents"
    assert not list(folder.glob("*.safetensors*"))
    story = Story()
    place.prepare(story=story)
    assert any(line.startswith("latents: 10 needed, 0 cached; 10 encoded") for line in story.lines)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_file_that_opens_at_the_third_attempt_is_trained_on(place: Place, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: dict[Path, int] = {}
    read_bytes, open_file = Path.read_bytes, Path.open

    def blink(path: Path) -> None:
        if path.parent == place.data and path.suffix == ".png" and refused.setdefault(path, 0) < 2:
            refused[path] += 1
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("helpers.storage.local._RETRY_AFTER_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Path, "read_bytes", lambda path: blink(path) or read_bytes(path))
    monkeypatch.setattr(Path, "open", lambda path, *rest, **named: blink(path) or open_file(path, *rest, **named))
    data = place.prepare()
    assert set(refused.values()) == {2} and len(refused) == 10
    assert len(latents(data)) == 10 and place.report()["used"] == 10


def test_damaged_latents_of_a_picture_that_has_changed_since_stop_the_run_by_name(place: Place) -> None:
    data = place.prepare()
    damage(place.output, "latents")
    for path in place.data.glob("*.png"):
        picture(path, seed=1234)
    with pytest.raises(DataError, match="toys/picture_.*start again"):
        epoch(data)


def test_a_changed_picture_of_the_same_size_is_not_taken_for_the_damaged_one(place: Place) -> None:
    data = place.prepare()
    damage(place.output, "latents")
    for index in range(10):
        picture(place.data / f"picture_{index:02}.png", 1000 + index, (96, 64) if index % 3 else (64, 96))
    with pytest.raises(DataError, match="toys/picture_.*no longer holds the same image; start again"):
        epoch(data)


def test_latents_do_not_depend_on_when_caching_was_interrupted(place: Place, tmp_path: Path) -> None:
    undisturbed = latents(Place(place.data, tmp_path / "other").prepare())
    for _ in range(2):  # three batches in all
        codec = ConvCodec()
        with pytest.raises(Interrupted):
            place.prepare(ToyFamily(codec), Workers(should_stop=lambda codec=codec: bool(codec.batches)))  # type: ignore[misc]
    codec = ConvCodec()
    assert_same(latents(place.prepare(ToyFamily(codec))), undisturbed)
    assert len(codec.batches) == 1


@pytest.mark.parametrize("folder", ["latents", "text"])
def test_a_missing_record_is_encoded_beside_the_batch_mates_it_always_had(place: Place, folder: str) -> None:
    expected = epoch(place.prepare(text_batch_size=4))
    cache = Cache(place.output / "cache" / folder)
    key = max((read_header(shard) for shard in cache.folder.glob("*.safetensors")), key=len)[2].key
    cache.discard(key)
    family = ToyFamily()
    for batch, right in zip(epoch(place.prepare(family, text_batch_size=4)), expected, strict=True):
        assert torch.equal(batch.latents, right.latents)
        assert all(torch.equal(batch.text[name], right.text[name]) for name in right.text)
    assert family.codec.batches == ([4] if folder == "latents" else [])
    assert len(family.encoders.encoded) == (0 if folder == "latents" else 4)


KILLED = """
    import sys, time
    from pathlib import Path
    from helpers.data.cache import cache
    from helpers.data.prepare import prepare_data
    from helpers.data.base.workers import Workers
    from tests.data.toys import ConvCodec, Story, ToyFamily, dataset, settings

    cache.SHARD_BYTES = 1500  # a shard for each record or two

    class Telling(ConvCodec):
        def encode(self, pixels):
            print("encoding", flush=True)
            return super().encode(pixels)

    data, output = Path(sys.argv[1]), Path(sys.argv[2])
    prepare_data([dataset(data, output / "cache")], settings(output), ToyFamily(Telling()), Workers(), Story())
"""


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_killed_while_caching_goes_on_to_the_same_latents(place: Place, tmp_path: Path, repository: Path, batches: int) -> None:
    undisturbed = latents(Place(place.data, tmp_path / "other").prepare())
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(place.data), str(place.output)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        assert process.stdout is not None
        for _ in range(batches):
            assert process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGKILL)
    before = tree_hash(place.data)
    assert_same(latents(place.prepare()), undisturbed)
    assert tree_hash(place.data) == before


class Gathering:
    """The meeting point of processes, played by threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.texts = [""] * world_size

    def of(self, rank: int) -> Callable[[str], Sequence[str]]:
        def gather(text: str) -> Sequence[str]:
            self.texts[rank] = text
            self.barrier.wait()
            told = list(self.texts)
            self.barrier.wait()
            return told

        return gather


def together(
    place: Place, world_size: int, make: Callable[[int], ToyFamily] | None = None, stopped: int | None = None, **changed: Any
) -> list[TrainingData | Exception]:
    """What `prepare` gives or raises in each of several processes."""
    meeting, results = Gathering(world_size), [None] * world_size

    def run(rank: int) -> None:
        workers = Workers(rank, world_size, meeting.of(rank), should_stop=lambda: rank == stopped)
        try:
            results[rank] = place.prepare(make(rank) if make else None, workers, **changed)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results  # type: ignore[return-value]


def test_two_processes_share_the_encoding_and_train_on_what_one_would(place: Place, tmp_path: Path) -> None:
    alone = Place(place.data, tmp_path / "alone").prepare(caption_dropout=0.3, accumulation=2)
    families = [ToyFamily(), ToyFamily()]
    shared = together(place, 2, families.__getitem__, caption_dropout=0.3)
    assert sum(families[0].codec.batches) < 10 and sum(families[1].codec.batches) < 10
    assert all(isinstance(data, TrainingData) for data in shared)
    ranks = [data.steps(0, 4) for data in shared]  # type: ignore[union-attr]
    for step, *parts in zip(alone.steps(0, 4), *ranks, strict=True):
        for one, (other,) in zip(step, parts, strict=True):
            assert (one.samples, one.captions, one.draws, one.epoch) == (other.samples, other.captions, other.draws, other.epoch)
            assert torch.equal(one.latents, other.latents)


def test_a_failure_in_one_process_ends_all_of_them(place: Place) -> None:
    class Broken(ConvCodec):
        def encode(self, pixels: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("device lost")

    results = together(place, 2, lambda rank: ToyFamily(Broken() if rank == 1 else ConvCodec()))
    assert str(results[0]) == "process 1 failed: RuntimeError: device lost" and str(results[1]) == "device lost"


def test_where_one_process_is_stopped_all_leave(place: Place) -> None:
    assert [type(result) for result in together(place, 2, stopped=1)] == [Interrupted, Interrupted]


def test_the_report_lists_what_any_process_could_not_decode(place: Place) -> None:
    broken = [f"picture_{index:02}.png" for index in (1, 3, 9)]
    for name in broken:
        (place.data / name).write_bytes((place.data / name).read_bytes()[:-200])
    one, two = together(place, 2)
    assert isinstance(one, TrainingData) and isinstance(two, TrainingData)
    assert [entry["key"] for entry in place.report()["left_out"]] == broken
    assert one.fingerprint() == two.fingerprint() and len(latents(one) | latents(two)) == 7


def test_several_data_sets_are_one_epoch_each_with_its_repeats(tmp_path: Path) -> None:
    one, two = pictures(tmp_path / "one", 3), pictures(tmp_path / "two", 4)
    output = tmp_path / "output"
    sets = [dataset(one, output / "cache", id="one", repeats=2), dataset(two, output / "cache", id="two")]
    data = prepare_data(sets, settings(output), ToyFamily(), Workers(), Story())  # type: ignore[arg-type]
    seen = [sample.dataset for batch in epoch(data) for sample in batch.samples]
    assert seen.count("one") == 9 and seen.count("two") == 4
    assert data.samples_per_epoch == 13


def test_several_data_sets_have_each_its_own_size_cut_captions_and_weight(tmp_path: Path) -> None:
    output = tmp_path / "output"
    sets = [
        dataset(pictures(tmp_path / "mine", 6), output / "cache", id="mine", probability=3.0),
        dataset(
            pictures(tmp_path / "class", 20),
            output / "cache",
            id="class",
            probability=1.0,
            ignore_epochs=True,
            is_regularisation_data=True,
            loss_weight=0.5,
            resolution=32,
            crop=True,
            crop_style="center",
            caption_strategy="instanceprompt",
            instance_prompt="a thing",
        ),
    ]
    story = Story()
    data = prepare_data(sets, settings(output), ToyFamily(), Workers(), story)  # type: ignore[arg-type]
    assert any(line.startswith("mix: mine ") and line.endswith(" of the micro-batches") for line in story.lines), story.lines
    batches = [batch for step in data.steps(0, 3 * data.micro_batches_per_epoch) for batch in step]
    of_class = [batch for batch in batches if batch.samples[0].dataset == "class"]
    assert 0 < len(of_class) < len(batches) / 2
    for batch in batches:
        regularises = batch.samples[0].dataset == "class"
        assert {sample.dataset for sample in batch.samples} == {"class" if regularises else "mine"}
        assert set(batch.loss_weight.tolist()) == {0.5 if regularises else 1.0}
        assert all((caption == "a thing") == regularises for caption in batch.captions)
        assert all((geometry.target == Size(32, 32)) == regularises for geometry in batch.geometry)
    mine = [sample.key for batch in batches for sample in batch.samples if sample.dataset == "mine"]
    assert all(mine.count(key) == 3 for key in mine)
    assert data.most_common_shape != Size(32, 32)  # although most pictures are of that size


def test_random_cuts_are_drawn_by_name_and_stay_the_same(place: Place, tmp_path: Path) -> None:
    cropped = {"crop": True, "crop_style": "random", "crop_aspect": "square", "resolution": 48}
    first = place.prepare(**cropped)
    added_image(place)
    second = Place(place.data, tmp_path / "second").prepare(**cropped)
    cuts = [
        {sample.key: geometry for batch in epoch(data) for sample, geometry in zip(batch.samples, batch.geometry, strict=True)}
        for data in (first, second)
    ]
    assert len({(geometry.top, geometry.left) for geometry in cuts[0].values()}) > 3
    assert all(cuts[1][key] == geometry for key, geometry in cuts[0].items())


def test_a_resumed_run_gets_the_batches_that_an_unbroken_one_gets_there(place: Place) -> None:
    unbroken = list(place.prepare(caption_dropout=0.3).steps(0, 20))
    resumed = list(place.prepare(caption_dropout=0.3).steps(13, 20))
    for step, other in zip(unbroken[13:], resumed, strict=True):
        assert [batch.samples for batch in step] == [batch.samples for batch in other]
        assert [batch.draws for batch in step] == [batch.draws for batch in other]
        assert all(torch.equal(one.latents, two.latents) for one, two in zip(step, other, strict=True))
