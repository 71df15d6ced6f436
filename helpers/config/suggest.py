"""Did you mean ...?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from helpers.errors import quoted


def nearest(name: str, known: Iterable[str], *, similarity: float = 0.6) -> str | None:
    """The known name most like `name`, letter case aside; None when none is near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=similarity)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """` (did you mean --lora_rank?)`, or nothing."""
    found = nearest(name, known)
    return f" (did you mean {prefix}{quoted(found)}?)" if found else ""


def looks_misspelt(name: str, known: Iterable[str]) -> str | None:
    """The known variable that `name` is a slip of the finger away from, or None.

    Stricter than `nearest`, because a user's own variables are none of our business.
    """
    found = nearest(name, known, similarity=0.8)
    if found is None:
        return None
    slips = edit_distance(name.upper(), found)
    return found if slips <= max(1, len(found) // 5) else None


def one_word_off(name: str, known: Iterable[str]) -> list[str]:
    """The known variables that have one word more or less than `name`: BATCH_SIZE => TRAIN_BATCH_SIZE, VAE_BATCH_SIZE."""
    words = set(name.upper().split("_"))
    return sorted(candidate for candidate in known if len(words) > 1 and len(words ^ set(candidate.split("_"))) == 1)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, before, row = before, row, [i]
        for j, right in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
