"""The exception tree that helpers/errors.py draws is the one it defines."""

from __future__ import annotations

import inspect
import re

import pytest

from helpers import errors
from helpers.errors import ConfigError, DataError, StorageError, UserError, is_out_of_memory, quoted, visible


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn, open_at = {}, {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([\s│├└─]*)([A-Z]\w+)(?:\s{2,}|$)", line):
            depth = len(found[1])
            drawn[found[2]] = next((open_at[above] for above in sorted(open_at, reverse=True) if above < depth), "")
            open_at = {above: name for above, name in open_at.items() if above < depth} | {depth: found[2]}
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__]
    defined = {kind.__name__: kind.__bases__[0].__name__ for kind in kinds}
    assert {name: parent for name, parent in drawn.items() if name != "Exception"} == defined


@pytest.mark.parametrize("value", ["photos", "/home/käthe/my photos", "고양이.png", "D:\\photos", "a'b"])
def test_a_value_that_can_be_seen_is_shown_as_it_is(value: str) -> None:
    assert quoted(value) == visible(value) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    {
        "": "''",
        "a ": "'a '",
        " a": "' a'",
        "a\nb": r"'a\nb'",
        "\x1b[2J": r"'\x1b[2J'",
        "\x9b2J": r"'\x9b2J'",
        "a\u202eb": r"'a\u202eb'",
    }.items(),
)
def test_a_value_that_cannot_be_seen_is_quoted_and_escaped(value: str, shown: str) -> None:
    assert quoted(value) == shown
    assert visible(f"no folder {quoted(value)}") == f"no folder {shown}"


@pytest.mark.parametrize("kind", [UserError, DataError, StorageError])
def test_no_message_carries_control_characters_to_the_terminal(kind: type[Exception]) -> None:
    assert str(kind("left out: \x1b[31mred.png\x07\r")) == r"left out: \x1b[31mred.png\x07\r"
    assert ConfigError("a\x1bb", "c").problems == (r"a\x1bb", "c")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_device_says_in_its_own_words_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
