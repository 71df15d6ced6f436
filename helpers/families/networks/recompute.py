"""Gradient checkpointing for networks whose diffusers classes have none, or one that keeps the largest activations."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any


def recompute(blocks: Iterable[Any]) -> None:
    """Keep only the inputs of each block, and run the block again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
