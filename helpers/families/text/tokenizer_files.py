"""Tokenizer files in the old layout, which many tools still need, in addition to the one that transformers 5 writes."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.foreign_json import parse_json
from helpers.storage.atomic import write_file


def complete_clip_tokenizer(folder: Path) -> None:
    """Add `vocab.json` and `merges.txt` to the folder of a CLIP tokenizer that has only `tokenizer.json`. Others stay unchanged."""
    combined = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() or not combined.is_file():
        return
    model = parse_json(combined.read_text(encoding="utf-8"))["model"]
    if model["type"] != "BPE":
        return  # another kind of tokenizer, such as T5's
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_file(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False).encode())
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
