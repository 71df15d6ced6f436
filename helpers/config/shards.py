"""Patterns of shard names: `pictures-{00000..00012}.tar` stands for thirteen files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_SHARDS = 100_000  # more is a slip of a finger

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for, in its order: `{07..12}` counts, with the zeros of its first number, `{a,b}` lists.

    ValueError, as the rest of a sentence about the pattern, when it cannot be read or stands for too many.
    """
    names = [""]
    at = 0
    for braces in _BRACES.finditer(pattern):
        choices = _choices(braces[1])
        if len(names) * len(choices) > MAX_SHARDS:
            raise ValueError(f"stands for more than {MAX_SHARDS:,} files")
        names = [name + pattern[at : braces.start()] + choice for name in names for choice in choices]
        at = braces.end()
    if _BRACES.sub("", pattern).count("{") or _BRACES.sub("", pattern).count("}"):
        raise ValueError("has a brace without its partner; write {00000..00012} or {a,b}")
    return [name + pattern[at:] for name in names]


def shard_problems(shards: Iterable[Path]) -> Iterator[str]:
    """What is wrong with the tars of a dataset, each as the rest of a sentence about `urls`."""
    first: dict[str, Path] = {}
    for shard in shards:
        if not shard.exists():
            yield f"there is no file {shard}; check the path"
        elif shard.is_dir():
            yield f"{shard} is a folder; name the tars in it, as {shard}/{{00000..00012}}.tar"
        elif shard.suffix != ".tar":
            yield f"{shard} is not named .tar; unpack what is compressed"
        elif (other := first.setdefault(shard.stem, shard)) is not shard:
            again = "stands there twice" if other == shard else f"and {other} have one name, which keys begin with; make them two datasets"
            yield f"{shard} {again}"


def _choices(inside: str) -> list[str]:
    """What stands between two braces, one by one."""
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        if "," not in inside:
            raise ValueError(f"{{{inside}}} is neither a range such as {{00000..00012}} nor a list such as {{a,b}}")
        return inside.split(",")
    start, end = int(counted[1]), int(counted[2])
    if end < start:
        raise ValueError(f"{{{inside}}} counts down; write the smaller number first")
    if end - start >= MAX_SHARDS:
        raise ValueError(f"stands for more than {MAX_SHARDS:,} files")
    return [f"{number:0{len(counted[1])}}" for number in range(start, end + 1)]
