"""Whether the files of a model are there and whole, each problem as one sentence with its remedy. Reads settings and headers alone."""

from __future__ import annotations

from pathlib import Path

from helpers.foreign_json import parse_json

LFS_POINTER = b"version https://git-lfs.github.com/"  # how the file begins that Git leaves in place of a large one
# How files begin that are not what their name says => what they are. The remedy follows.
DISGUISES: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype", "a web page, which was saved instead of the model: download the file itself"),
    (b"<html", "a web page, which was saved instead of the model: download the file itself"),
    (b"<?xml", "an XML page, which was saved instead of the model: download the file itself"),
    (b"pk\x03\x04", "a zip or a PyTorch file in spite of its name, which can run code: get the .safetensors file"),
    (b"\x80\x02", "a pickle in spite of its name, which can run code: get the .safetensors file"),
    (b"\x80\x04", "a pickle in spite of its name, which can run code: get the .safetensors file"),
    (b"gguf", "a GGUF file: get the .safetensors file"),
    (b'{"error', "an error message of the server, which was saved instead of the model: download the file itself"),
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")  # a tokenizer has one of them
TABLES = (*VOCABULARIES, "merges.txt")


def problem_with(path: Path) -> str | None:
    """The reason why a file cannot be read; None if it exists and, for JSON and safetensors, is complete."""
    if not path.is_file():
        return f"{path} is missing: {remedy(path)}."
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
        is_weights = path.suffix.lower() == ".safetensors"
        if not start:
            return f"{path} is empty: {remedy(path)}."
        if start == LFS_POINTER:
            return f"{path} only points to what Git LFS has not fetched: run `git lfs pull` in the model's folder, or fetch it otherwise."
        if (is_weights or path.suffix == ".json") and (disguise := _disguise(start, is_weights)):
            return f"{path} is {disguise}."
        if is_weights and is_cut_off(path):
            return f"{path} is cut off, as an interrupted download leaves it: {remedy(path)}."
        if path.suffix == ".json":
            parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})."
    except ValueError as error:
        return f"{path} is damaged ({error}): {remedy(path)}."
    return None


def _disguise(start: bytes, is_weights: bool) -> str | None:
    """What a file really is, by its first bytes. A safetensors file begins with 8 bytes of length; JSON may begin as an error does."""
    begins = start.lstrip().lower()
    return next((text for mark, text in DISGUISES if begins.startswith(mark) and (is_weights or mark.startswith(b"<"))), None)


def remedy(path: Path) -> str:
    """How to get a complete file. Files in the hub's cache may not have been downloaded yet, as after a dataset report."""
    from huggingface_hub import constants

    if "snapshots" in path.parts and constants.HF_HUB_OFFLINE:
        return "start once without HF_HUB_OFFLINE, and what the cache of the hub has not got is fetched"
    return "fetch the model again"


def settings_file(component: str) -> str:
    """The name of the file with a component's settings."""
    if component.endswith("scheduler"):
        return "scheduler_config.json"
    return "tokenizer_config.json" if component.startswith("tokenizer") else "config.json"


def unreadable_settings(component: Path) -> str | None:
    """What is wrong with the settings of a component or, of a tokenizer, with its tables."""
    settings = component / settings_file(component.name)
    if problem := problem_with(settings):
        return problem
    content = parse_json(settings.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        return f"{settings} holds no settings: {remedy(settings)}."
    if not component.name.startswith("tokenizer"):
        return None
    tables = [path for name in TABLES if (path := component / name).is_file()]
    if not any(path.name in VOCABULARIES for path in tables):
        return f"The tokenizer in {component} is without its vocabulary ({', '.join(VOCABULARIES)}): {remedy(component)}."
    return next(filter(None, map(problem_with, tables)), None)


def is_cut_off(path: Path) -> bool:
    """Whether a safetensors file ends before its last tensor does. Reads the header alone; a damaged one counts as cut off."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            return True
        try:
            header = parse_json(stream.read(length))
            end = max((int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return True
    return 8 + length + end > size
