"""Tokenizer files in the old layout, beside the one transformers 5 writes: many tools still read only the old."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.storage.atomic import write_file


def complete_clip_tokenizer(folder: Path) -> None:
    """Add `vocab.json` and `merges.txt` to a CLIP tokenizer folder that has only `tokenizer.json`; others are left alone."""
    combined = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() or not combined.is_file():
        return
    model = json.loads(combined.read_text(encoding="utf-8"))["model"]
    if model["type"] != "BPE":
        return  # a tokenizer of another kind, as T5's
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_file(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False).encode())
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
