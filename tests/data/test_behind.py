"""Latents encoded while training runs: the same batches as after caching everything, whatever happens in between."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.config.aspects import AspectBucket
from helpers.data.base.workers import Workers
from helpers.data.batches import Batch
from helpers.data.cache.cache import Cache
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.common import EncodeOptions
from helpers.data.encode.pipeline import RecordWriter
from helpers.data.training_data import TrainingData
from helpers.errors import DataError, StorageError
from helpers.storage.local import LocalSource
from tests.data.test_prepare import Gathering, Place, damage, together
from tests.data.toys import ConvCodec, Story, ToyFamily, picture, pictures, tree_hash

CROPPED = {"crop": True, "crop_style": "random", "crop_aspect": "square", "flip": True, "resolution": 48}
REDRAWN = {**CROPPED, "vae_cache_clear_each_epoch": True}
RESHAPED = {**REDRAWN, "crop_aspect": "random", "crop_aspect_buckets": (AspectBucket(0.5), AspectBucket(1.0), AspectBucket(1.5))}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(pictures(tmp_path / "data", 20), tmp_path / "output")


@pytest.fixture
def other(place: Place, tmp_path: Path) -> Place:
    """The same pictures, and another output folder."""
    return Place(place.data, tmp_path / "other")


class Slow(ConvCodec):
    """Takes a while for each batch, and counts those that run at once."""

    def __init__(self, seconds: float = 0.02) -> None:
        super().__init__()
        self.seconds = seconds

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        return super().encode(pixels)


def seen(steps: Iterator[list[Batch]]) -> list[object]:
    """Everything of each batch that training can tell apart."""
    return [
        (batch.samples, batch.captions, batch.geometry, batch.draws, batch.epoch, batch.stands_in, batch.latents.numpy().tobytes())
        for step in steps
        for batch in step
    ]


def workers_of_codec() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("latents", "batches")]


@pytest.mark.parametrize(
    "changed", [{}, {"accumulation": 3, "caption_dropout": 0.3}, REDRAWN, RESHAPED], ids=["plain", "accumulating", "redrawn", "reshaped"]
)
def test_behind_training_the_same_batches_come_as_after_caching(place: Place, other: Place, changed: dict[str, object]) -> None:
    cached = seen(place.prepare(**changed).steps(0, 40))
    before = tree_hash(place.data)
    data = other.prepare(ToyFamily(Slow()), encode_while_training=True, **changed)
    assert seen(data.steps(0, 40)) == cached
    assert tree_hash(place.data) == before and not workers_of_codec()


def test_the_first_step_waits_for_its_own_batches_only(place: Place) -> None:
    codec = Slow(0.1)
    data = place.prepare(ToyFamily(codec), encode_while_training=True)
    steps = data.steps(0, 100)
    next(steps)
    assert len(codec.batches) <= 1 + 2 + 3 * 2  # to warm up; of this step; of those made ahead of it
    steps.close()
    assert not workers_of_codec()


def test_what_training_never_needs_is_not_encoded_and_what_it_needed_is_kept(place: Place) -> None:
    codec = Slow(0.05)
    data = place.prepare(ToyFamily(codec), encode_while_training=True)
    assert len(list(data.steps(0, 2))) == 2
    encoded = sum(codec.batches[1:])
    assert encoded < 20
    story = Story()
    place.prepare(story=story, encode_while_training=True)
    assert f"latents: 20 needed, {encoded} cached; the rest is encoded while training runs" in story.lines


def test_a_cache_that_is_complete_loads_no_codec_and_starts_no_thread(place: Place) -> None:
    expected = seen(place.prepare().steps(0, 10))
    family, story = ToyFamily(), Story()
    data = place.prepare(family, story=story, encode_while_training=True)
    assert seen(data.steps(0, 10)) == expected and not family.codec.batches
    assert "latents: 20 needed, 20 cached" in story.lines


def test_captions_are_all_encoded_before_the_first_step(place: Place) -> None:
    family = ToyFamily()
    place.prepare(family, encode_while_training=True)
    assert len(family.encoders.encoded) == 21


@pytest.mark.parametrize("changed", [{}, REDRAWN, RESHAPED], ids=["plain", "redrawn", "reshaped"])
def test_stopped_and_started_again_and_again_the_same_batches_come(place: Place, other: Place, changed: dict[str, object]) -> None:
    expected = [seen(iter([step])) for step in place.prepare(**changed).steps(0, 30)]
    for first in range(0, 30, 7):
        steps = other.prepare(ToyFamily(Slow(0.005)), encode_while_training=first % 2 == 0, step=first, **changed).steps(first, 30)
        for step in range(first, min(first + 7, 30)):
            assert seen(iter([next(steps)])) == expected[step]
        steps.close()  # in the middle of encoding


# -- images that turn out broken ---------------------------------------------------------------------------------------------


def break_pixels(place: Place, *numbers: int) -> list[str]:
    names = [f"picture_{number:02}.png" for number in numbers]
    for name in names:
        (place.data / name).write_bytes((place.data / name).read_bytes()[:-200])
    return names


def test_broken_images_leave_their_places_empty_in_both_ways_and_are_reported_at_the_end(place: Place, other: Place) -> None:
    broken = break_pixels(place, 3, 4, 11)
    cached = seen(place.prepare(batch_size=1).steps(0, 30))
    story = Story()
    data = other.prepare(story=story, encode_while_training=True, batch_size=1)
    assert other.report()["used"] == 20
    assert seen(data.steps(0, 30)) == cached
    assert sum(1 for batch in cached if batch[5]) > 2  # type: ignore[index]  # stand-ins, at one image a batch
    report = other.report()
    assert report == place.report()
    assert (report["found"], report["used"]) == (20, 17) and [entry["key"] for entry in report["left_out"]] == broken
    assert any("3 more left out, found while encoding (3 unreadable)" in line for line in story.lines)


def test_the_next_new_run_leaves_broken_images_out_and_a_resumed_one_keeps_its_plan(place: Place) -> None:
    break_pixels(place, 3, 4)
    first = place.prepare(encode_while_training=True)
    expected = seen(first.steps(0, 20))
    anew = place.prepare(encode_while_training=True)
    assert seen(anew.steps(0, 20)) == expected  # no checkpoint: killed before, a run begins as it began
    first.remember_undecodable()
    resumed = place.prepare(step=5, undecodable=first.undecodable)
    assert resumed.fingerprint(like=first.fingerprint()) == first.fingerprint()
    assert seen(resumed.steps(5, 20)) == [batch for batch in expected if batch[3].step >= 5]  # type: ignore[index]
    new = place.prepare()
    assert new.samples_per_epoch == 18 and new.undecodable == {"toys": ["picture_03.png", "picture_04.png"]}
    again = place.prepare(step=5, undecodable=new.undecodable)
    assert again.fingerprint() == new.fingerprint()
    assert place.report()["used"] == 18 and len(place.report()["left_out"]) == 2


def test_a_data_set_of_which_nothing_can_be_encoded_stops_training_by_name(place: Place) -> None:
    break_pixels(place, *range(20))
    data = place.prepare(encode_while_training=True)
    with pytest.raises(DataError, match="'toys': none of its 20 images .* could be encoded; picture_00.png: unreadable"):
        list(data.steps(0, 10**6))
    assert not workers_of_codec()


# -- faults ------------------------------------------------------------------------------------------------------------------


class Breaking(ConvCodec):
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        if len(self.batches) > 2:
            raise RuntimeError("device lost")
        return super().encode(pixels)


def test_what_fails_in_the_thread_fails_in_training(place: Place) -> None:
    data = place.prepare(ToyFamily(Breaking()), encode_while_training=True)
    with pytest.raises(RuntimeError, match="device lost"):
        list(data.steps(0, 30))
    assert not workers_of_codec()


class Small(ConvCodec):
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode(pixels)


def test_a_batch_that_does_not_fit_is_halved_behind_training_too(place: Place) -> None:
    codec = Small()
    samples = [
        sample
        for step in place.prepare(ToyFamily(codec), encode_while_training=True, vae_batch_size=5).steps(0, 11)
        for sample in step[0].samples
    ]
    assert len({sample.key for sample in samples}) == 20 and max(codec.batches) == 2


def test_a_store_that_fails_stops_training_in_a_sentence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place.prepare(ToyFamily(Slow()), encode_while_training=True)

    def read(self: LocalSource, key: str) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalSource, "read", read)
    with pytest.raises(StorageError, match="could not be read: Input/output error"):
        list(data.steps(0, 10))


# -- several processes -------------------------------------------------------------------------------------------------------


def in_step(ranks: list[TrainingData], steps: int) -> list[list[object]]:
    """What each process sees of these steps, in threads that meet after each step as processes do."""
    barrier = threading.Barrier(len(ranks), timeout=60)
    found: list[list[object]] = [[] for _ in ranks]

    def run(rank: int) -> None:
        for step in ranks[rank].steps(0, steps):
            found[rank] += seen(iter([step]))
            barrier.wait()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("changed", [{}, REDRAWN], ids=["plain", "redrawn"])
@pytest.mark.parametrize("behind", [True, False])
def test_two_processes_encode_disjoint_shares_and_find_the_others_records(
    place: Place, other: Place, behind: bool, changed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.data.encode.encoder.SHARE_SECONDS", 0.05)
    break_pixels(place, 7)
    alone = seen(place.prepare(accumulation=2, **changed).steps(0, 16))
    families = [ToyFamily(Slow(0.01)), ToyFamily(Slow(0.01))]
    ranks = together(other, 2, families.__getitem__, encode_while_training=behind, **changed)
    assert all(isinstance(data, TrainingData) for data in ranks), ranks
    one, two = in_step(ranks, 16)  # type: ignore[arg-type]
    assert [batch for pair in zip(one, two, strict=True) for batch in pair] == alone
    if not changed:
        counts = [sum(family.codec.batches) - behind for family in families]
        assert sum(counts) in (19, 20) and min(counts) >= 6, counts


# -- drawn anew each epoch ---------------------------------------------------------------------------------------------------


def cuts(data: TrainingData, epochs: int) -> list[dict[str, tuple[int, int, bool]]]:
    """For each epoch, where each picture is cut and whether it is mirrored."""
    found: list[dict[str, tuple[int, int, bool]]] = [{} for _ in range(epochs)]
    for (batch,) in data.steps(0, data.micro_batches_per_epoch * epochs):
        for sample, geometry in zip(batch.samples, batch.geometry, strict=True):
            found[batch.epoch][sample.key] = (geometry.top, geometry.left, geometry.flip)
    return found


def test_cuts_are_drawn_anew_for_each_epoch_and_the_same_in_every_run(place: Place, other: Place) -> None:
    found = cuts(place.prepare(**REDRAWN), 4)
    assert all(len(epoch) == 20 for epoch in found)
    assert sum(one != two for key in found[0] for one, two in [(found[0][key], found[1][key])]) > 10
    assert cuts(other.prepare(**REDRAWN), 4) == found
    first, second = cuts(Place(place.data, other.output / "kept").prepare(**CROPPED), 2)
    assert first == second


def shapes(data: TrainingData, epochs: int) -> list[dict[str, object]]:
    """For each epoch, the size that each picture is trained at."""
    found: list[dict[str, object]] = [{} for _ in range(epochs)]
    for (batch,) in data.steps(0, 10**6):
        if batch.epoch == epochs:
            return found
        for sample, geometry in zip(batch.samples, batch.geometry, strict=True):
            assert sample.key not in found[batch.epoch]
            found[batch.epoch][sample.key] = geometry.target
    raise AssertionError("training ended")


def test_shapes_are_drawn_anew_for_each_epoch_and_each_picture_has_its_turn(place: Place, other: Place) -> None:
    found = shapes(place.prepare(**RESHAPED), 5)
    assert all(len(epoch) == 20 for epoch in found)
    assert found[0] != found[1] != found[2]
    assert shapes(other.prepare(encode_while_training=True, **RESHAPED), 5) == found


def test_shapes_may_stay_while_cuts_are_drawn_anew(place: Place, other: Place) -> None:
    kept = {**RESHAPED, "aspects_stay": True}
    first, second = shapes(place.prepare(**kept), 2)
    assert first == second
    one, two = cuts(other.prepare(**kept), 2)
    assert one != two


def test_two_passes_lie_on_disk_for_a_moment_three_and_those_of_other_runs_stay(place: Place) -> None:
    data = place.prepare(**REDRAWN)
    folder = place.output / "cache" / "latents"
    (folder / "of-another-run-epoch-0").mkdir()
    most = 0
    for (batch,) in data.steps(0, data.micro_batches_per_epoch * 5):
        numbers = sorted(int(path.name.rsplit("-", 1)[1]) for path in folder.glob("epoch-*"))
        most = max(most, len(numbers))
        assert batch.epoch in numbers and numbers[0] >= batch.epoch - 1
        time.sleep(0.01)
    assert most == 3  # for the first steps of an epoch, the one just over lies there still
    assert (folder / "of-another-run-epoch-0").exists()
    place.prepare(**REDRAWN, step=data.micro_batches_per_epoch * 4)
    assert sorted(int(path.name.rsplit("-", 1)[1]) for path in folder.glob("epoch-*"))[0] == 4


def test_a_pass_that_is_over_is_let_go_when_the_next_begins_also_by_an_encoder_that_never_rests(tmp_path: Path) -> None:
    over, next_one = Cache(tmp_path / "over"), Cache(tmp_path / "next")
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue, RecordWriter(catalogue, EncodeOptions(batch_size=1)) as records:
        unsealed = weakref.ref(records.writer(over))
        over.give_up()
        assert records.writer(next_one) is records.writer(next_one)
        assert unsealed() is None


def test_the_fingerprint_tells_sets_that_are_redrawn(place: Place) -> None:
    one, two = place.prepare(**REDRAWN).fingerprint(), place.prepare(**CROPPED).fingerprint()
    assert {name for name in one if one[name] != two[name]} == {"redrawn", "plan"}


# -- the fingerprint of what has not been read ---------------------------------------------------------------------------------


def begun(place: Place) -> TrainingData:
    """A run that has read some of its images, and not all."""
    data = place.prepare(ToyFamily(Slow(0.05)), encode_while_training=True)
    assert len(list(data.steps(0, 2))) == 2
    assert "images_unread" in data.fingerprint()
    return data


def test_unread_images_may_change_and_read_ones_may_not(place: Place) -> None:
    data = begun(place)
    held = json.loads(json.dumps(data.fingerprint()))
    trained = {sample.key for step in place.prepare(encode_while_training=True).steps(0, 2) for sample in step[0].samples}
    assert place.prepare().fingerprint(like=held) == held  # everything is read now
    never = min({f"picture_{number:02}.png" for number in range(20)} - read_by(held, place))
    picture(place.data / never, seed=99, size=(96, 64) if int(never[8:10]) % 3 else (64, 96))
    assert place.prepare(encode_while_training=True).fingerprint(like=held) == held
    key = min(trained)
    picture(place.data / key, seed=98, size=(96, 64) if int(key[8:10]) % 3 else (64, 96))
    changed = place.prepare(encode_while_training=True).fingerprint(like=held)
    assert {name for name in held if changed[name] != held[name]} == {"images"}


def read_by(held: dict[str, str], place: Place) -> set[str]:
    from helpers.data.fingerprint import _unpacked

    unread = _unpacked(held["images_unread"], 20)
    assert unread is not None
    return {f"picture_{number:02}.png" for number in range(20) if not unread[number]}


def test_read_images_that_were_only_touched_are_the_same(place: Place) -> None:
    import os

    held = begun(place).fingerprint()
    for path in place.data.glob("*.png"):
        os.utime(path, (1, 1))
    assert place.prepare(encode_while_training=True).fingerprint(like=held) == held


def test_the_cache_is_sound_after_it_was_filled_behind_training(place: Place) -> None:
    list(place.prepare(ToyFamily(Slow(0.01)), encode_while_training=True).steps(0, 11))
    assert not Cache(place.output / "cache" / "latents").notes
    family = ToyFamily()
    place.prepare(family)
    assert not family.codec.batches


def test_the_meeting_point_of_threads_is_not_needed_by_the_encoding(place: Place) -> None:
    """Once training has begun, no process gathers anything to encode."""
    calls: list[str] = []
    meeting = Gathering(1)
    gather = meeting.of(0)
    workers = Workers(0, 1, lambda text: calls.append(text) or gather(text))  # type: ignore[func-returns-value]
    data = place.prepare(ToyFamily(Slow(0.01)), workers, encode_while_training=True)
    before = len(calls)
    list(data.steps(0, 11))
    assert len(calls) == before


# -- the same image under several names -----------------------------------------------------------------------------------------


def test_copies_of_an_image_give_the_same_batches_in_both_ways_and_after_damage(place: Place, other: Place) -> None:
    """Only one record is kept for them; beside which batch-mates it was encoded must not depend on the way."""
    for number in range(0, 18, 3):
        for copy in ("a_first", "z_last"):
            (place.data / f"{copy}_{number}.png").write_bytes((place.data / f"picture_{number:02}.png").read_bytes())
            (place.data / f"{copy}_{number}.txt").write_text(f"caption of {copy} {number}")
    cached = seen(place.prepare().steps(0, 30))
    assert seen(other.prepare(ToyFamily(Slow(0.005)), encode_while_training=True).steps(0, 30)) == cached
    damage(place.output, "latents")
    assert seen(place.prepare(step=0).steps(0, 30)) == cached
    damage(other.output, "latents")
    resumed = seen(other.prepare(step=9).steps(9, 30))
    assert resumed == [batch for batch in cached if batch[3].step >= 9]  # type: ignore[index]
