"""A cache whose shards are in a store: nothing is lost with the machine, and the folder here stays within its limit."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.data.cache.cache import Cache, DamagedRecordError, Writer, record_key
from helpers.data.cache.index import INDEX
from helpers.data.cache.remote import RemoteShards
from helpers.errors import StorageError
from tests.storage.memory import MemoryBackend

KEYS = [record_key("record", str(number)) for number in range(12)]
RECORD = 4096  # bytes


class Store(MemoryBackend):
    """Counts what is read, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.wholes, self.fails = 0, 0, ""

    def read(self, key: str) -> bytes:
        self.wholes += threading.current_thread().name.startswith("shards")
        return super().read(key)

    def read_part(self, key: str, offset: int, size: int) -> bytes:
        self.parts += 1
        if self.fails == "read":
            raise OSError(errno.EIO, "the store fell silent")
        return super().read_part(key, offset, size)

    def write(self, key: str, data: bytes) -> None:
        if self.fails == "write":
            raise StorageError("memory: SlowDown")
        super().write(key, data)


def record(number: int) -> dict[str, Tensor]:
    return {"mean": torch.full((RECORD // 4,), float(number))}


def opened(folder: Path, store: Store, limit: int | None = None) -> Cache:
    return Cache(folder, RemoteShards(store, folder, limit))


def fill(cache: Cache, numbers: range = range(12), in_a_shard: int = 3) -> None:
    with Writer(cache) as writer:
        for number in numbers:
            writer.add(KEYS[number], record(number))
            if number % in_a_shard == in_a_shard - 1:
                writer.seal()


def all_read(cache: Cache) -> bool:
    return all(torch.equal((cache.get(key) or {})["mean"], record(number)["mean"]) for number, key in enumerate(KEYS))


def here(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors*")}


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.fixture
def store() -> Store:
    return Store()


def test_a_fresh_machine_finds_everything_in_the_store(tmp_path: Path, store: Store) -> None:
    fill(opened(tmp_path / "one", store))
    assert {entry.key for entry in store.list()} == here(tmp_path / "one") and len(here(tmp_path / "one")) == 4
    fresh = opened(tmp_path / "other", store)
    assert fresh.notes == ["4 shards in memory added to the index."]
    assert here(tmp_path / "other") == set()
    assert all_read(fresh)
    assert store.parts > 0
    assert eventually(lambda: here(tmp_path / "other") == here(tmp_path / "one"))
    before = store.parts
    assert all_read(fresh) and store.parts == before  # from the copies
    assert opened(tmp_path / "other", store).notes == []


def test_the_index_knows_only_what_the_store_has(tmp_path: Path, store: Store) -> None:
    store.fails = "write"
    cache = opened(tmp_path, store)
    with pytest.raises(StorageError, match="SlowDown"):
        fill(cache)
    assert cache.get(KEYS[0]) is None
    cache.close()
    store.fails = ""  # what was sealed before the store failed is uploaded by the next start
    again = opened(tmp_path, store)
    assert [entry.key for entry in store.list()] == sorted(here(tmp_path)) and here(tmp_path)
    assert torch.equal((again.get(KEYS[0]) or {})["mean"], record(0)["mean"])


def test_the_folder_stays_within_its_limit_and_nothing_is_lost(tmp_path: Path, store: Store) -> None:
    shard = 3 * RECORD + 4096  # with its header, at most
    cache = opened(tmp_path, store, limit=2 * shard)
    fill(cache)
    assert len(list(store.list())) == 4
    assert sum((tmp_path / name).stat().st_size for name in here(tmp_path)) <= 2 * shard
    assert here(tmp_path) == {entry.key for entry in list(store.list())[2:]}  # the longest unused went first
    assert all_read(cache)
    tiny = opened(tmp_path / "tiny", store, limit=1)
    assert all_read(tiny) and here(tmp_path / "tiny") == set()


def test_a_copy_that_is_used_stays_longer(tmp_path: Path, store: Store) -> None:
    cache = opened(tmp_path, store, limit=2 * (3 * RECORD + 4096))
    fill(cache, range(6))
    first, second = sorted(here(tmp_path))
    cache.get(KEYS[0])
    fill(cache, range(6, 9))
    assert first in here(tmp_path) and second not in here(tmp_path)


@pytest.mark.parametrize("damage", ["a flipped byte", "cut off", "removed"])
def test_a_damaged_copy_is_no_damage(damage: str, tmp_path: Path, store: Store) -> None:
    cache = opened(tmp_path, store)
    fill(cache)
    cache.close()
    for name in here(tmp_path):
        data = bytearray((tmp_path / name).read_bytes())
        data[-100] ^= 1
        (tmp_path / name).unlink()
        if damage != "removed":
            (tmp_path / name).write_bytes(data if damage == "a flipped byte" else data[:-8])
    assert all_read(opened(tmp_path, store))


def test_a_lost_index_is_made_again_without_sending_anything(tmp_path: Path, store: Store) -> None:
    cache = opened(tmp_path, store)
    fill(cache)
    cache.close()
    for path in tmp_path.glob(f"{INDEX}*"):
        path.unlink()
    store.fails = "write"
    assert all_read(opened(tmp_path, store))


def test_what_the_store_lost_goes_there_again_where_there_is_a_copy(tmp_path: Path, store: Store) -> None:
    cache = opened(tmp_path, store)
    fill(cache)
    cache.close()
    names = sorted(here(tmp_path))
    for name in names[:2]:
        store.delete(name)
    (tmp_path / names[0]).unlink()
    again = opened(tmp_path, store)
    assert [entry.key for entry in store.list()] == names[1:]
    assert again.get(KEYS[0]) is None and again.get(KEYS[3]) is not None
    assert any(f"{names[0]} is missing or incomplete" in note for note in again.notes)


def test_damage_in_the_store_is_told_as_such(tmp_path: Path, store: Store) -> None:
    fill(opened(tmp_path / "one", store))
    [name, gone, *_] = [entry.key for entry in store.list()]
    data = bytearray(store.read(name))
    data[-100] ^= 1
    store.write(name, bytes(data))
    store.write("01234567890123456789-0-1-0.safetensors", b"no shard")
    fresh = opened(tmp_path / "other", store)
    assert "01234567890123456789-0-1-0.safetensors is not used: it is cut off" in fresh.notes[0]
    store.delete(gone)
    for number in (2, 3):
        with pytest.raises(DamagedRecordError):
            fresh.get(KEYS[number])
    store.fails = "read"
    with pytest.raises(StorageError, match="memory: .*safetensors could not be read: the store fell silent"):
        fresh.get(KEYS[8])


def test_machines_that_fill_one_store_at_once_lose_nothing(tmp_path: Path, store: Store) -> None:
    one, other = opened(tmp_path / "one", store), opened(tmp_path / "other", store)
    fill(one, range(6))
    fill(other, range(6, 12))
    assert all_read(opened(tmp_path / "third", store))
    assert all_read(opened(tmp_path / "one", store))


def test_two_openings_of_one_folder_may_take_in_the_same_shards(tmp_path: Path, store: Store) -> None:
    fill(opened(tmp_path / "one", store))
    caches: list[Cache] = []
    threads = [threading.Thread(target=lambda: caches.append(opened(tmp_path / "both", store))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches) == 4 and all(all_read(cache) for cache in caches)


def test_a_full_disk_costs_the_copy_and_not_the_run(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(opened(tmp_path / "one", store))
    fresh = opened(tmp_path / "other", store)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("helpers.data.cache.remote.os.ftruncate", full)
    assert all_read(fresh) and all_read(fresh)
