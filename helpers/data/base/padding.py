"""Text tensors of which the network sees only some rows: kept without the others, and filled up where they stand side by side.

The family says so by the names of what its encoders give: `X_mask` (L,) beside `X` (L, ...) tells which rows of `X` are seen. Most
captions are far shorter than the encoders read, and the states of T5 are large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MASK = "_mask"


def without_padding(record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One caption's tensors without the rows behind the last one that their mask lets through; others as they are."""
    kept = dict(record)
    for name, mask in _masks(record).items():
        length = int(mask.nonzero().max()) + 1 if mask.any() else 0
        kept[name], kept[name + MASK] = record[name][:length], mask[:length]
    return kept


def stacked(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Records of the same names => tensors (B, ...); masked ones are filled up with zeros, masks too, to the longest."""
    masks = _masks(records[0])
    ragged = {*masks, *(name + MASK for name in masks)}
    return {name: _column([record[name] for record in records], name in ragged) for name in records[0]}


def _masks(record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a record by the name of what they mask."""
    return {name: record[name + MASK] for name in record if name + MASK in record}


def _column(tensors: Sequence[Tensor], ragged: bool) -> Tensor:
    return pad_sequence(list(tensors), batch_first=True) if ragged else torch.stack(list(tensors))
