from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.config.json_file import MAX_BYTES, JsonDocument, read_json
from helpers.errors import ConfigError


def read(folder: Path, content: str | bytes) -> JsonDocument:
    path = folder / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_json(path)


def test_comments_commas_a_bom_and_windows_line_endings_are_fine(tmp_path: Path) -> None:
    text = '\ufeff[\r\n  // one\r\n  {"a": 1, /* two\r\n */ "b": [true, null,],},\r\n  "http://x // not a comment",\r\n]\r\n'
    document = read(tmp_path, text)
    assert document.value == [{"a": 1, "b": [True, None]}, "http://x // not a comment"]


def test_every_key_and_element_has_its_line(tmp_path: Path) -> None:
    document = read(tmp_path, '[\n{"a":\n 1,\n\n"b": [2,\n3]}]')
    assert document.lines == {(0,): 2, (0, "a"): 2, (0, "b"): 5, (0, "b", 0): 5, (0, "b", 1): 6}
    assert document.where((0, "b", 1)) == f"{document.path}, line 6"
    assert document.where((0, "c")) == f"{document.path}, line 2"
    assert document.where((9,)) == str(document.path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values, st.sampled_from([None, 1]), st.booleans())
def test_what_json_writes_is_read_back(value: object, indent: int | None, ascii_only: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert read(Path(folder), json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")).value == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: the file ends too early"),
        ("[1, 2", "line 1: a comma or ] is missing before the end of the file"),
        ('{"a": 1\n"b": 2}', 'line 2: a comma or } is missing before "b"'),
        ('{"a": 1, "a": 2}', 'the key "a" stands twice'),
        ("{a: 1}", "a key in double quotes is expected, not a"),
        ("['a']", "text stands in double quotes"),
        ("[NaN]", "NaN is not a value"),
        ("[-Infinity]", "is not expected here"),
        ("[1e999]", "1e999 is not a finite number"),
        (f"[{'9' * 5000}]", "is not a finite number"),
        ('{"a" 1}', 'a colon is missing after "a"'),
        ("[] []", "'[' after the end of the document"),
        ('["C:\\data"]', "a backslash is written twice"),
        ("[01]", "line 1"),
        ("[" * 100_000, "nested deeper than 32"),
        ('{"a":' * 100_000, "nested deeper than 32"),
        (b"[\xff\xfe]", "not UTF-8 text (byte 1)"),
    ],
)
def test_what_is_not_json_is_refused_with_its_line(text: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value) and "data.json" in str(caught.value)


def test_a_file_that_is_no_settings_file_is_refused_at_once(tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        read(tmp_path, b" " * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="check the path"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="check the path"):
        read_json(tmp_path)
    assert time.perf_counter() - start < 1
