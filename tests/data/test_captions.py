from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from helpers.data.catalogue.captions import MAX_CAPTION_BYTES, SHUFFLES, Captioner, CaptionError, CaptionRule, TagShuffle, decode_caption
from helpers.errors import DataError

SHUFFLED = CaptionRule("textfile", shuffle=TagShuffle(seed=1))


def captions(rule: CaptionRule, *texts: str, key: str = "sub_folder/a_red_fox_2.5.jpg") -> tuple[str, ...]:
    return Captioner(rule, "set").captions(key, texts or None)


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


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("cat".encode("utf-16-le").decode(), CaptionRule("textfile")),  # which is sound UTF-8
        ("a cat", CaptionRule("instanceprompt", instance_prompt="a cat\0")),
        ("a zebra", CaptionRule("textfile", filters=(r"s/zebra/\0/",))),
    ],
)
def test_a_zero_byte_is_no_text_wherever_it_comes_from(text: str, rule: CaptionRule) -> None:
    with pytest.raises(CaptionError, match="caption is not text: it holds a zero byte; save it as UTF-8 text"):
        Captioner(rule, "mine").captions("cat.png", (text,))


def test_a_book_is_no_caption() -> None:
    with pytest.raises(CaptionError, match="caption too long: cat.txt has more than 1,048,576 bytes"):
        decode_caption(b"x" * (MAX_CAPTION_BYTES + 1), "cat.txt")


@pytest.mark.parametrize(
    ("rule", "caption"),
    [
        (CaptionRule("textfile"), "from the file"),
        (CaptionRule("jsonl"), "from the file"),
        (CaptionRule("filename"), "a red fox 2.5"),
        (CaptionRule("instanceprompt", "sks dog"), "sks dog"),
        (CaptionRule("textfile", "sks dog", prepend_instance_prompt=True), "sks dog from the file"),
        (CaptionRule("filename", "sks dog", prepend_instance_prompt=True), "sks dog a red fox 2.5"),
        (CaptionRule("instanceprompt", "sks dog", prepend_instance_prompt=True), "sks dog"),
        (CaptionRule("textfile", "sks dog", only_instance_prompt=True), "sks dog"),
    ],
)
def test_each_strategy_finds_its_caption(rule: CaptionRule, caption: str) -> None:
    assert captions(rule, "from the file") == (caption,)


def test_a_missing_and_an_empty_caption_are_told_apart() -> None:
    with pytest.raises(CaptionError, match=r"no caption: sub/fox\.txt is missing"):
        captions(CaptionRule("textfile"), key="sub/fox.jpg")
    with pytest.raises(CaptionError, match=r"empty caption: sub/fox\.txt holds no text"):
        captions(CaptionRule("textfile", "sks", prepend_instance_prompt=True), "", key="sub/fox.jpg")
    with pytest.raises(CaptionError, match=r"empty caption: ___\.jpg holds no text"):
        captions(CaptionRule("filename"), key="___.jpg")
    with pytest.raises(CaptionError, match=r"empty caption: fox\.txt holds no text"):
        captions(CaptionRule("textfile", multiple=True), " \n \n", key="fox.jpg")


def test_only_a_strategy_that_needs_caption_files_opens_them() -> None:
    assert CaptionRule("textfile").reads_files
    assert not CaptionRule("textfile", "x", only_instance_prompt=True).reads_files
    assert not CaptionRule("filename").reads_files
    assert CaptionRule("csv").table == "csv"
    assert CaptionRule("csv", "x", only_instance_prompt=True).table is None


def test_each_line_is_a_caption_only_where_that_is_asked_for() -> None:
    text = "a cat\n\n  a tabby \na cat"
    assert captions(CaptionRule("textfile"), text) == (text,)
    assert captions(CaptionRule("textfile", multiple=True), text) == ("a cat", "a tabby", "a cat")
    prepended = CaptionRule("textfile", "sks", prepend_instance_prompt=True, multiple=True)
    assert captions(prepended, "a cat\na dog", "a cow") == ("sks a cat", "sks a dog", "sks a cow")


# -- shuffled tags ----------------------------------------------------------------------------------------------------------


def test_shuffled_captions_are_orders_of_the_same_tags_after_those_that_stay() -> None:
    tags = ["one", "two", "three", "four", "five", "six"]
    found = captions(replace(SHUFFLED, shuffle=TagShuffle(1, keep=2)), ", ".join(tags))
    assert len(found) == SHUFFLES and len(set(found)) > 4
    for caption in found:
        order = caption.split(", ")
        assert order[:2] == tags[:2] and sorted(order) == sorted(tags)


def test_every_tag_comes_first_as_often_as_any_other() -> None:
    captioner = Captioner(SHUFFLED, "set")
    firsts = Counter(caption.split(", ")[0] for index in range(500) for caption in captioner.captions(f"{index}.png", ["a, b, c, d"]))
    assert all(abs(count / (500 * SHUFFLES) - 0.25) < 0.03 for count in firsts.values()) and len(firsts) == 4


def test_orders_follow_from_seed_data_set_key_and_number_alone() -> None:
    text = "a, b, c, d, e, f, g"
    first = captions(SHUFFLED, text)
    script = (
        "from tests.data.test_captions import SHUFFLED, captions\n"
        f"print(captions(SHUFFLED, {text!r}) == {first!r})"
    )  # another process hashes texts otherwise
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "True\n"
    others = [
        captions(replace(SHUFFLED, shuffle=TagShuffle(2)), text),
        Captioner(SHUFFLED, "other").captions("sub_folder/a_red_fox_2.5.jpg", [text]),
        captions(SHUFFLED, text, key="b.png"),
    ]
    assert len({first, *others}) == 4


def test_several_captions_stay_equally_likely_when_only_one_has_tags() -> None:
    found = captions(replace(SHUFFLED, multiple=True), "a, b, c\nno tags")
    assert found.count("no tags") == SHUFFLES == len(found) / 2
    assert captions(replace(SHUFFLED, multiple=True), "no tags\nnone either") == ("no tags", "none either")


@pytest.mark.parametrize(
    ("separator", "text", "sorted_tags", "between"),
    [
        (",", "b,a", ["a", "b"], ","),
        (",", "b, a,c ,, ", ["a", "b", "c"], ", "),
        (" ", "b a\nc", ["a", "b", "c"], " "),
        ("|", "b | a", ["a", "b"], " | "),
        (".", "b. a", ["a", "b"], ". "),
    ],
)
def test_tags_are_joined_as_they_were_written(separator: str, text: str, sorted_tags: list[str], between: str) -> None:
    for caption in captions(replace(SHUFFLED, shuffle=TagShuffle(1, separator=separator)), text):
        assert sorted(caption.split(between)) == sorted_tags


# -- filters ----------------------------------------------------------------------------------------------------------------


def filtered(text: str, *lines: str) -> str:
    [caption] = captions(CaptionRule("textfile", filters=lines), text)
    return caption


@pytest.mark.parametrize(
    ("line", "text", "caption"),
    [
        ("in this image", "a cat in this image sits", "a cat  sits"),
        ("nice.", "a nice. nicer cat", "a  nicer cat"),  # a dot alone is a dot
        ("^The image shows ", "The image shows a cat. The image shows", "a cat. The image shows"),
        (r"\s*\(.*?\)", "a cat (from above) sits (still)", "a cat sits"),
        ("[Cc]olou?r", "Color and colour", "and"),
        ("s/cat/dog/", "a cat and a cat", "a dog and a dog"),
        ("s/cat/dog", "a cat", "a dog"),
        (r"s/(\w+) cat/cat, \1/", "a red cat", "a cat, red"),
        (r"s/a\/c/b/", "a/c", "b"),
        ("s/c.t//", "a cut above", "a  above"),
        ("s/cat", "s/cat", None),  # no replacement: plain text, of which nothing is left
    ],
)
def test_a_filter_line_is_applied_as_what_it_is(line: str, text: str, caption: str | None) -> None:
    if caption is None:
        with pytest.raises(CaptionError, match="empty caption: the filters leave nothing of 's/cat'"):
            filtered(text, line)
    else:
        assert filtered(text, line) == caption


def test_each_line_is_applied_once_and_in_order() -> None:
    assert filtered("aab", "s/aa/a/") == "ab"
    assert filtered("x-y", "s/x/y/", "s/y/z/") == "z-z"
    assert filtered("catcatat", "cat") == "at", "what a removal brings together is not removed again"
    assert filtered("b.c bxc", "b.c") == "bxc", "plain text is not tried as an expression too"


def test_filters_come_before_shuffling_and_leave_the_instance_prompt_alone() -> None:
    rule = replace(SHUFFLED, instance_prompt="ugly sks", prepend_instance_prompt=True, filters=("ugly, ",))
    assert set(captions(rule, "ugly, a, b")) <= {"ugly sks a, b", "ugly sks b, a"}
    assert captions(CaptionRule("textfile", multiple=True, filters=("a cat",)), "a cat\na cat sits") == ("sits",)


def test_an_expression_that_does_not_come_to_an_end_stops_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.data.catalogue.caption_filters.SECONDS", 0.05)
    with pytest.raises(DataError, match=r"caption_filter_list: '\(a\|aa\)\+\$' takes longer than 0\.05 s on the caption of b/c\.png"):
        captions(CaptionRule("textfile", filters=("(a|aa)+$",)), "a" * 60 + "!", key="b/c.png")
