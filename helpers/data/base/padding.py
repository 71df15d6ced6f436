"""Text tensors with an attention mask: cached without their padding, and padded again to a batch.

If a family's text encoders return `X` (L, ...) and `X_mask` (L,), the mask says which rows of `X` the network attends to. Most captions
are much shorter than the encoders' limit, and T5 embeddings are large: without padding they take a fraction of the space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MASK = "_mask"


def without_padding(record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One caption's tensors without the rows after the last one in the mask. Tensors without a mask are returned as they are."""
    kept = dict(record)
    for name, mask in _masks(record).items():
        length = int(mask.nonzero().max()) + 1 if mask.any() else 0
        kept[name], kept[name + MASK] = record[name][:length], mask[:length]
    return kept


def stacked(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack B records to tensors (B, ...). Tensors with a mask, and the masks, are padded with zeros to the longest."""
    masks = _masks(records[0])
    ragged = {*masks, *(name + MASK for name in masks)}
    return {name: _stack([record[name] for record in records], name in ragged) for name in records[0]}


def _masks(record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a record, by the name of the tensor they belong to."""
    return {name: record[name + MASK] for name in record if name + MASK in record}


def _stack(tensors: Sequence[Tensor], ragged: bool) -> Tensor:
    return pad_sequence(list(tensors), batch_first=True) if ragged else torch.stack(list(tensors))
