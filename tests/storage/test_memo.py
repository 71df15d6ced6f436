"""A memo gives back what was stored for the same inputs, and nothing else: no other inputs, no damaged file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.errors import StorageError
from helpers.storage.memo import Memo, digest_of, file_state


def test_a_result_is_computed_once_for_the_same_inputs(tmp_path: Path) -> None:
    made = []

    def recalled(inputs: str) -> list[int]:
        return Memo(tmp_path / "new" / "memo").recall("name", inputs, lambda: made.append(inputs) or [len(made)])

    assert [recalled("a"), recalled("a"), recalled("b"), recalled("b"), recalled("a")] == [[1], [1], [2], [2], [3]]
    assert len(list((tmp_path / "new" / "memo").iterdir())) == 1  # the latest result of a name replaces the earlier one


@pytest.mark.parametrize("name", ["plain", "with/slash", "..", "é" * 500, "caf\udce9", "", "two\nlines"])
def test_any_name_and_any_bytes_come_back(tmp_path: Path, name: str) -> None:
    memo = Memo(tmp_path)
    for payload in (b"", b"\n", b"\0\n\xff" * 1000):
        memo.save_bytes(name, "inputs", payload)
        assert memo.load_bytes(name, "inputs") == payload
    assert memo.load_bytes(name + ".", "inputs") is None


def test_a_damaged_file_only_costs_time(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    memo.save_value("name", "inputs", {"a": [1, 2.5, None, "é"]})
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    for damaged in (b"", b"{}", whole[:-1], whole + b" ", whole[: len(whole) // 2], b"\0" * len(whole), *flipped):
        file.write_bytes(damaged)
        assert memo.load_value("name", "inputs") is None
    assert memo.recall("name", "inputs", lambda: 7) == memo.recall("name", "inputs", lambda: 8) == 7


def test_a_result_that_cannot_be_stored_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        Memo(tmp_path / "file").save_value("name", "inputs", 1)


def test_a_forgotten_result_is_gone_and_others_stay(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    memo.save_value("one", "inputs", 1)
    memo.save_value("two", "inputs", 2)
    memo.forget("one")
    memo.forget("one")
    assert (memo.load_value("one", "inputs"), memo.load_value("two", "inputs")) == (None, 2)


def test_inputs_are_told_apart_by_every_part_and_by_their_order() -> None:
    digests = [digest_of(*inputs) for inputs in ((), ("a",), ("a", "b"), ("b", "a"), ("ab",), (["a", "b"],), (1,), ("1",), (None,))]
    assert len(set(digests)) == len(digests)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_another_file(tmp_path: Path) -> None:
    """As `tar -x`, rsync and `cp -a` leave it: they restore modification times."""
    path, other = tmp_path / "a", tmp_path / "b"
    for file, content in ((path, b"one"), (other, b"two")):
        file.write_bytes(content)
        os.utime(file, ns=(0, 1_700_000_000_000_000_000))
    memo = Memo(tmp_path / "memo")

    def content() -> str:
        return memo.recall("content", digest_of(file_state(path)), lambda: path.read_text())

    assert content() == "one"
    other.replace(path)  # another inode
    assert content() == "two"
    path.write_bytes(b"six")  # the same inode
    os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    assert content() == "six"
    shutil.copy2(path, other)
    assert file_state(other) != file_state(path)  # so the copy is read, and found to hold the same
