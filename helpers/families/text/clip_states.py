"""CLIP states as inputs of a U-Net: 77 of them for a caption, or a multiple of 77 if long captions are encoded in chunks.

In a batch of captions with different numbers of states, a mask hides the padding, so that a prediction does not depend on the other
captions. A pipeline needs equally many states for the prompt and the negative prompt. There, the states of each are repeated as a whole:
cross-attention does not depend on the order of its keys and values, and repeating all of them equally often does not change its output.
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
MASK = "prompt_embeds_mask"  # named by the rule of helpers/data/base/padding.py, so that the cache stores states without padding


def of_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The states (B, L, D) of a batch in float32 and, unless all captions have L of them, the mask (B, L) of those that are not padding."""
    import torch

    states = {STATES: batch.text[STATES].to(device, torch.float32)}
    mask = batch.text.get(MASK)
    return states if mask is None or bool(mask.all()) else {**states, MASK: mask.to(device)}


def arguments(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the argument names of diffusers' U-Nets."""
    states = {"encoder_hidden_states": conditioning[STATES]}
    mask = conditioning.get(MASK)
    return states if mask is None else {**states, "encoder_attention_mask": mask}


def prompt_arguments(text: TextTensors, negative: TextTensors) -> dict[str, Any]:
    """The states of a prompt and its negative prompt, equally many, by the argument names of diffusers' pipelines; batch dimension 1."""
    states, negative_states = text[STATES], negative[STATES]
    length = math.lcm(len(states), len(negative_states))
    return {
        "prompt_embeds": states.repeat(length // len(states), 1).unsqueeze(0),
        "negative_prompt_embeds": negative_states.repeat(length // len(negative_states), 1).unsqueeze(0),
    }
