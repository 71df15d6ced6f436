"""How long it takes to cache captions as text embeddings, compared with bare batched encoding.

    python -m benchmarks.text_caching [--captions 256] [--rounds 5] [--profile]

The bare loop tokenizes and encodes the same captions in the same batches with transformers, and discards the results. Our code also looks
up cached embeddings, counts captions that are too long, checks, hashes, seals and indexes. Both text encoders have SDXL's architecture and
random weights. They are narrower than the real ones, so our share of the time is larger here than in real use.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.material import caption, run_settings, write_photographs
from benchmarks.measure import compared, conclude, in_turns, parser, profile
from helpers.data.cache.cache import Cache
from helpers.data.encode.common import EncodeOptions
from helpers.data.encode.texts import CaptionEncoder
from helpers.data.ports import TextEncoders
from helpers.families import FAMILIES
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl

MOST_OF_BARE = 1.2  # time of caching, relative to bare encoding
BATCH = 16
SIZES = SdxlSizes(text_width=256, text_2_width=384, text_layers=4, text_heads=4, pooled_width=384)


class Bare:
    """Batched encoding with transformers alone."""

    def __init__(self, model: Path) -> None:
        self.encoders: list[tuple[Any, Any]] = [
            (CLIPTokenizer.from_pretrained(model / f"tokenizer{suffix}"), kind.from_pretrained(model / f"text_encoder{suffix}").eval())
            for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection))
        ]

    @torch.no_grad()
    def seconds(self, captions: Sequence[str]) -> float:
        began = time.perf_counter()
        for start in range(0, len(captions), BATCH):
            for tokenizer, encoder in self.encoders:
                batch = list(captions[start : start + BATCH])
                ids = tokenizer(batch, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
                encoder(ids, output_hidden_states=True)
        return time.perf_counter() - began


def cached(folder: Path, encoders: TextEncoders, captions: Sequence[str]) -> float:
    """Seconds to fill an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        cache = Cache(Path(place))
        began = time.perf_counter()
        encoder = CaptionEncoder(cache, encoders, EncodeOptions(batch_size=BATCH))
        encoder.encode(encoder.pending(captions))
        seconds = time.perf_counter() - began
        cache.close()
    assert encoder.totals.encoded == len(captions)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--captions", type=int, default=256)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    captions = sorted(caption(index) for index in range(chosen.captions))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_sdxl(folder / "model", sizes=SIZES)
        config = run_settings(folder / "run", model, write_photographs(folder / "images", 1), 64)
        family = FAMILIES[config.family_name](config.model, config.cache)
        bare = Bare(model)
        with family.text_encoders(torch.device("cpu")) as encoders:

            def by_hand() -> float:
                return bare.seconds(captions)

            def ours() -> float:
                return cached(folder, encoders, captions)

            by_hand(), ours()  # warm-up: loads the encoders
            rounds = in_turns(chosen.rounds, by_hand, ours)
            if chosen.profile:
                profile("bare encoding", by_hand)
                profile("caching", ours)
    each = [(theirs * 1e3 / len(captions), mine * 1e3 / len(captions)) for theirs, mine in rounds]
    return conclude([compared("a caption cached", "ms", each, at_most=MOST_OF_BARE)], chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
