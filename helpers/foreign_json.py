"""JSON from elsewhere: models, LoRA files, tables, caches, checkpoints. Whatever it holds, reading it gives a value or a ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(data: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value, as `json.loads` gives it.

    ValueError, with a reason, for what is not JSON, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(data, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
