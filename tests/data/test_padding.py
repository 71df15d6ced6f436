"""Text of which only some rows are seen is kept without the others, and filled up for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.data.base.padding import stacked, without_padding
from helpers.data.cache.cache import Cache
from helpers.data.encode.common import EncodeOptions
from helpers.data.encode.keys import text_key
from helpers.data.encode.texts import CaptionEncoder


def record(length: int, read: int = 6) -> dict[str, Tensor]:
    """What encoders that read `read` tokens give for a caption of `length`: row i of the states holds i + 1, padding included."""
    states = torch.arange(1.0, read + 1)[:, None].repeat(1, 4)
    return {"states": states, "states_mask": torch.arange(read) < length, "pooled": torch.full((3,), float(length))}


def test_rows_behind_the_last_one_that_is_seen_are_not_kept() -> None:
    kept = without_padding(record(2))
    assert kept["states"][:, 0].tolist() == [1, 2] and kept["states_mask"].tolist() == [True, True]
    assert kept["pooled"].tolist() == [2, 2, 2]


def test_a_hole_in_a_mask_stays_and_a_mask_of_nothing_leaves_no_rows() -> None:
    holed = {"states": torch.ones(6, 4), "states_mask": torch.tensor([True, False, True, False, False, False])}
    assert without_padding(holed)["states_mask"].tolist() == [True, False, True]
    assert without_padding(record(0))["states"].shape == (0, 4)


def test_tensors_without_a_mask_are_kept_whole() -> None:
    plain = {"prompt_embeds": torch.zeros(77, 8), "mask": torch.zeros(5)}
    assert {name: tensor.shape for name, tensor in without_padding(plain).items()} == {"prompt_embeds": (77, 8), "mask": (5,)}


def test_records_of_different_lengths_are_filled_up_with_zeros_that_are_not_seen() -> None:
    batch = stacked([without_padding(record(length)) for length in (3, 1)])
    assert batch["states"][:, :, 0].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["states_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["pooled"][:, 0].tolist() == [3, 1]


def test_tensors_without_a_mask_that_differ_in_shape_are_still_an_error() -> None:
    with pytest.raises(RuntimeError, match="equal size"):
        stacked([{"mean": torch.zeros(4, 8, 8)}, {"mean": torch.zeros(4, 8, 9)}])


class Encoders:
    """Captions of as many words as they have tokens."""

    fingerprint = "words"
    truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        rows = [record(len(caption.split())) for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_cache_holds_only_what_is_seen_of_a_caption(tmp_path: Path) -> None:
    cache, encoders, options = Cache(tmp_path), Encoders(), EncodeOptions(batch_size=2, cache_dtype="bf16")
    encoder = CaptionEncoder(cache, encoders, options)
    encoder.encode([["a red circle", "blue"]])
    encoder.store(None, {name: tensor[0] for name, tensor in encoders.encode(["x y"]).items()})
    for caption, length in (("a red circle", 3), ("blue", 1), (None, 2)):
        found = cache.get(text_key(caption, "words", "bf16"))
        assert found is not None
        assert found["states"].shape == (length, 4) and found["states"].dtype == torch.bfloat16
        assert found["states_mask"].dtype == torch.bool and found["states_mask"].all() and len(found["states_mask"]) == length
