"""What a U-Net is told of captions by CLIP: states of 77 tokens or, where long captions are encoded in chunks, of as many times 77.

Attention knows no order: keys and values that stand there several times, all of them equally often, give the same answer. So the states
of one caption may be repeated as a whole, where a pipeline wants those of two captions to be equally many; and where captions of a
batch differ, a mask keeps each to its own, so that its answer does not depend on what stands beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from helpers.data.batches import Batch
    from helpers.data.ports import TextTensors

STATES = "prompt_embeds"
MASK = "prompt_embeds_mask"  # by the rule of helpers/data/base/padding.py, so that a cache holds what is there alone


def of_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The states of a batch (B, L, D) float32 and, where not all captions have L of them, the mask (B, L) of those that are there."""
    import torch

    told = {STATES: batch.text[STATES].to(device, torch.float32)}
    mask = batch.text.get(MASK)
    return told if mask is None or bool(mask.all()) else {**told, MASK: mask.to(device)}


def arguments(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' U-Nets call them."""
    told = {"encoder_hidden_states": conditioning[STATES]}
    mask = conditioning.get(MASK)
    return told if mask is None else {**told, "encoder_attention_mask": mask}


def prompt_arguments(text: TextTensors, negative: TextTensors) -> dict[str, Any]:
    """The states of a prompt and its negative, equally many, as diffusers' pipelines call them, each with a batch dimension of 1."""
    states, negative_states = text[STATES], negative[STATES]
    length = math.lcm(len(states), len(negative_states))
    return {
        "prompt_embeds": states.repeat(length // len(states), 1).unsqueeze(0),
        "negative_prompt_embeds": negative_states.repeat(length // len(negative_states), 1).unsqueeze(0),
    }
