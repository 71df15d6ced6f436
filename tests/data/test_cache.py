"""A cache keeps what was sealed, byte for byte, whatever happens to the processes that use it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from helpers.data.cache import cache as cache_module
from helpers.data.cache.cache import Cache, DamagedRecordError, Writer, record_key
from helpers.data.cache.index import INDEX
from helpers.data.cache.shards import SUFFIX, UNSEALED, pack, unpack
from helpers.errors import StorageError


def record(number: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((4, 8, 8), number, dtype=torch.float16)}


def key(number: int) -> bytes:
    return record_key("test", str(number))


def fill(folder: Path, numbers: range, rank: int = 0, seal_after: float = 30.0) -> None:
    with Writer(Cache(folder), rank, seal_after) as writer:
        for number in numbers:
            writer.add(key(number), record(number), f"subject {number}", {"image": str(number)})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def assert_holds(folder: Path, numbers: range) -> None:
    cache = Cache(folder)
    for number in numbers:
        found = cache.get(key(number))
        assert found is not None and torch.equal(found["mean"], record(number)["mean"])


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool])
shapes = st.lists(st.integers(1, 5), max_size=3)


@given(
    st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=5), st.tuples(dtypes, shapes), min_size=1, max_size=4)
)
def test_a_record_comes_back_as_it_was_whatever_its_types_and_shapes(layout: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: (torch.arange(int(torch.Size(shape).numel())) % 2).reshape(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    packed = pack(key(0), tensors)
    found = unpack(packed.layout, bytearray(packed.payload))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_any_tool_reads_a_shard_as_safetensors_and_sees_the_same_tensors(tmp_path: Path) -> None:
    records = {
        key(0): {"mask": torch.tensor([True, False, True]), "states": torch.randn(7, 3), "pooled": torch.randn(5).bfloat16()},
        key(1): {"states": torch.randn(1).double(), "ids": torch.arange(3, dtype=torch.int16)},
    }
    with Writer(Cache(tmp_path)) as writer:
        for name, tensors in records.items():
            writer.add(name, tensors)
    (shard,) = shards(tmp_path)
    with safe_open(shard, "pt") as file:
        for name, tensors in records.items():
            for tensor_name, tensor in tensors.items():
                assert torch.equal(file.get_tensor(f"{name.hex()}/{tensor_name}"), tensor)


def test_a_slice_of_a_batch_is_stored_alone_and_the_overhead_is_small(tmp_path: Path) -> None:
    batch = torch.randn(200, 4, 64, 64).half()
    with Writer(Cache(tmp_path)) as writer:
        for number in range(200):
            writer.add(key(number), {"mean": batch[number]}, f"subject {number}", {"image": "x" * 64, "encoder": "y" * 64})
    stored = sum(path.stat().st_size for path in tmp_path.iterdir() if not path.name.endswith(("-wal", "-shm")))
    assert stored <= 1.05 * batch.nbytes
    assert torch.equal((Cache(tmp_path).get(key(7)) or {})["mean"], batch[7])


def test_shards_are_sealed_when_full_and_when_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 2048)  # a record has 512 bytes
    fill(tmp_path, range(10))
    assert len(shards(tmp_path)) == 3
    fill(tmp_path, range(10, 13), seal_after=-1.0)
    assert len(shards(tmp_path)) == 6
    assert_holds(tmp_path, range(13))


def test_what_is_not_sealed_does_not_exist(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    writer = Writer(cache)
    writer.add(key(1), record(1))
    assert cache.get(key(1)) is None and not Cache(tmp_path).find([key(1)])["shard"][0]
    writer.seal()
    assert_holds(tmp_path, range(1, 2))


def test_the_first_record_of_a_key_stays_until_it_is_discarded(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    cache = Cache(tmp_path)

    def write_and_read(number: int) -> float:
        with Writer(cache) as writer:
            writer.add(key(0), record(number))
        return float((cache.get(key(0)) or {})["mean"][0, 0, 0])

    assert write_and_read(5) == 0
    cache.discard(key(0))
    assert cache.get(key(0)) is None
    assert write_and_read(6) == 6


def test_a_flipped_byte_is_noticed_by_name_and_the_record_can_be_made_again(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (shard,) = shards(tmp_path)
    cache = Cache(tmp_path)
    location = cache.find([key(1)])[0]
    data = bytearray(shard.read_bytes())
    data[int(location["offset"]) + 100] ^= 1
    shard.write_bytes(data)
    damaged = Cache(tmp_path)
    with pytest.raises(DamagedRecordError, match=shard.name):
        damaged.read(location)
    assert torch.equal((damaged.get(key(0)) or {})["mean"], record(0)["mean"])
    damaged.discard(key(1))
    with Writer(damaged) as writer:
        writer.add(key(1), record(1))
    assert_holds(tmp_path, range(3))


def test_a_shard_that_is_gone_or_cut_off_makes_its_records_missing(tmp_path: Path) -> None:
    for numbers in (range(2), range(2, 4), range(4, 6)):
        fill(tmp_path, numbers)
    gone, cut, _ = shards(tmp_path)
    gone.unlink()
    os.truncate(cut, cut.stat().st_size - 1)
    cache = Cache(tmp_path)
    assert [bool(place) for place in cache.find(map(key, range(6)))["shard"]] == [False] * 4 + [True] * 2
    told = "\n".join(cache.notes)
    assert gone.name in told and cut.name in told


@pytest.mark.parametrize("damage", ["removed", "overwritten"])
def test_a_lost_index_is_made_again_from_the_shards(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, range(4))
    fill(tmp_path, range(4, 8))
    for path in tmp_path.glob(f"{INDEX}*"):
        path.unlink()
    if damage == "overwritten":
        (tmp_path / INDEX).write_bytes(b"this is no database" * 100)
    assert_holds(tmp_path, range(8))


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    foreign = [tmp_path / "holiday.safetensors", tmp_path / "notes.txt", tmp_path / "model.safetensors.tmp"]
    for path in foreign:
        path.write_bytes(b"mine")
    Cache(tmp_path)
    assert all(path.read_bytes() == b"mine" for path in foreign)


KILLED = """
    import sys, time, torch
    from pathlib import Path
    from helpers.data.cache import cache as module
    from helpers.data.cache.cache import Cache, Writer, record_key
    module.SHARD_BYTES = 4096
    cache = Cache(Path(sys.argv[1]))
    writer = Writer(cache)
    for number in range(100000):
        writer.add(record_key("test", str(number)), {"mean": torch.full((4, 8, 8), number, dtype=torch.float16)})
        if number % 50 == 0:
            print(number, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 9])
def test_a_killed_writer_loses_its_open_shard_and_nothing_else(tmp_path: Path, repository: Path, lines: int) -> None:
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        assert process.stdout is not None
        written = [int(process.stdout.readline()) for _ in range(lines)][-1]
        process.send_signal(signal.SIGKILL)
    sealed = max(0, (written // 8) * 8 - 8)  # a shard holds 8 records
    assert_holds(tmp_path, range(sealed))
    assert not list(tmp_path.glob(f"*{UNSEALED}"))
    fill(tmp_path, range(written + 50))
    assert_holds(tmp_path, range(written + 50))


def test_a_shard_whose_writer_died_before_the_commit_is_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    writer = Writer(cache)
    writer.add(key(0), record(0))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "commit", lambda *arguments: None)  # as if killed between rename and commit
        writer.seal()
    assert cache.get(key(0)) is None
    assert_holds(tmp_path, range(1))


def test_the_open_shard_of_a_living_writer_is_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = Cache(tmp_path)
    writer = Writer(writing)
    writer.add(key(0), record(0))
    seen: list[list[str]] = []
    commit = writing.commit

    def watched(*arguments: object) -> None:
        seen.append(Cache(tmp_path).notes)  # another process starts in the worst moment: renamed, not yet committed
        commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "commit", watched)
    writer.seal()
    assert seen == [[]]
    assert_holds(tmp_path, range(1))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_told_and_what_was_sealed_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fill(tmp_path, range(3))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left on device") as told:
        patch.setattr(os, call, full)
        fill(tmp_path, range(3, 6))
    assert str(tmp_path) in str(told.value)
    assert len(shards(tmp_path)) == 1 and not list(tmp_path.glob(f"*{UNSEALED}"))
    assert_holds(tmp_path, range(3))
    assert Cache(tmp_path).get(key(4)) is None


def test_several_processes_fill_one_cache_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(tmp_path, range(100 * n, 100 * n + 150), n)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert_holds(tmp_path, range(250))


def test_a_cache_tells_which_fact_changed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with Writer(cache) as writer:
        writer.add(key(0), record(0), "cat.png", {"image": "a", "encoder": "b"})
    assert cache.changed_fact("dog.png", {"image": "a"}) == "new"
    assert cache.changed_fact("cat.png", {"image": "z", "encoder": "z"}) == "image"
    assert cache.changed_fact("cat.png", {"image": "a", "encoder": "z"}) == "encoder"
    assert cache.changed_fact("cat.png", {"image": "a", "encoder": "b"}) == "lost"


def test_keys_depend_on_every_part_and_on_where_parts_end() -> None:
    assert len({record_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), ("c", "ab"), ("\udc80",)]}) == 6


def test_an_index_that_cannot_be_used_is_a_storage_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with sqlite3.connect(tmp_path / INDEX) as other:
        other.execute("DROP TABLE records")
    with pytest.raises(StorageError, match=INDEX):
        cache.find([key(0)])


def test_an_open_shard_can_be_read_from_and_one_that_nobody_needs_is_dropped(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with Writer(cache) as writer:
        writer.add(key(1), record(1))
        held = writer.get(key(1))
        assert held is not None and all(torch.equal(held[name], tensor) for name, tensor in record(1).items())
        assert writer.get(key(2)) is None and cache.get(key(1)) is None
        writer.seal()
        assert writer.get(key(1)) is None and cache.get(key(1)) is not None
        writer.add(key(2), record(2))
        cache.give_up()
    assert len(shards(tmp_path)) == 1
