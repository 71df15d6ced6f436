from __future__ import annotations

import pytest

from helpers.data.captions import MAX_CAPTION_BYTES, CaptionError, CaptionRule, caption_of, decode_caption


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        (b"  a cat,\r\non a mat \r\n\r\n", "a cat,\non a mat"),
        (b"old mac\rline", "old mac\nline"),
        ('ein Kätzchen 🐈 "$HOME" `x` *'.encode(), 'ein Kätzchen 🐈 "$HOME" `x` *'),
        (b" \n", ""),
        (b"", ""),
    ],
)
def test_caption_files_of_any_editor_are_read(data: bytes, text: str) -> None:
    assert decode_caption(data, "cat.txt") == text


@pytest.mark.parametrize("data", ["Kätzchen".encode("latin-1"), "cat".encode("utf-16"), b"\xff\xfe"])
def test_a_caption_in_another_encoding_is_named_and_not_guessed(data: bytes) -> None:
    with pytest.raises(CaptionError, match=r"caption is not UTF-8: sub/cat\.txt; save it as UTF-8"):
        decode_caption(data, "sub/cat.txt")


def test_a_book_is_no_caption() -> None:
    with pytest.raises(CaptionError, match="caption too long: cat.txt has"):
        decode_caption(b"x" * (MAX_CAPTION_BYTES + 1), "cat.txt")


@pytest.mark.parametrize(
    ("rule", "caption"),
    [
        (CaptionRule("textfile"), "from the file"),
        (CaptionRule("filename"), "a red fox 2.5"),
        (CaptionRule("instanceprompt", "sks dog"), "sks dog"),
        (CaptionRule("textfile", "sks dog", prepend_instance_prompt=True), "sks dog from the file"),
        (CaptionRule("filename", "sks dog", prepend_instance_prompt=True), "sks dog a red fox 2.5"),
        (CaptionRule("instanceprompt", "sks dog", prepend_instance_prompt=True), "sks dog"),
        (CaptionRule("textfile", "sks dog", only_instance_prompt=True), "sks dog"),
    ],
)
def test_each_strategy_finds_its_caption(rule: CaptionRule, caption: str) -> None:
    assert caption_of("sub_folder/a_red_fox_2.5.jpg", "from the file", rule) == caption


def test_a_missing_and_an_empty_caption_are_told_apart() -> None:
    with pytest.raises(CaptionError, match=r"no caption: sub/fox\.txt is missing"):
        caption_of("sub/fox.jpg", None, CaptionRule("textfile"))
    with pytest.raises(CaptionError, match=r"empty caption: sub/fox\.txt says nothing"):
        caption_of("sub/fox.jpg", "", CaptionRule("textfile", "sks", prepend_instance_prompt=True))
    with pytest.raises(CaptionError, match=r"empty caption: ___\.jpg says nothing"):
        caption_of("___.jpg", None, CaptionRule("filename"))


def test_only_a_strategy_that_needs_caption_files_opens_them() -> None:
    assert CaptionRule("textfile").reads_files
    assert not CaptionRule("textfile", "x", only_instance_prompt=True).reads_files
    assert not CaptionRule("filename").reads_files
