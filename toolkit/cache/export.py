"""Decode cached latents to an image."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from helpers.data.cache.shards import unpack
from helpers.errors import DataError
from helpers.storage.atomic import write_file
from toolkit.cache.current_run import CurrentRun, ImageEntry
from toolkit.cache.view import view_of
from toolkit.cache.why import explain


def export(run: CurrentRun, entry: ImageEntry, target: Path) -> tuple[int, int]:
    """Decode an image's current latents with the run's VAE into a PNG, and return its width and height. DataError if it has none."""
    import torch

    current, lines = explain(entry)
    if not current:
        raise DataError(lines[0].rstrip(".") + ".")
    with view_of(entry.cache) as view:
        found = view.find(entry.key)
        assert found is not None  # `explain` has just found it
        shard, placed = found
        mean = unpack(placed.layout, view.payload(shard, placed))["mean"].float()
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")
    with run.family.image_codec(device) as codec:
        pixels = codec.decode(mean.unsqueeze(0).to(device))[0]  # (3, H, W) in [-1, 1]
    levels = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    stream = io.BytesIO()
    image = Image.fromarray(levels)
    image.save(stream, "PNG")
    write_file(target, stream.getvalue())
    return image.size
