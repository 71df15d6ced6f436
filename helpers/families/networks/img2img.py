"""Pictures that begin with pictures, as the pipelines of diffusers are told."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def img2img_arguments(latents: Tensor, steps: int, strength: float) -> dict[str, Any]:
    """Of the steps of the whole schedule, a pipeline makes this share: at least one."""
    return {"image": latents, "strength": strength, "num_inference_steps": max(steps, math.ceil(1 / strength))}
