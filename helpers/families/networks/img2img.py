"""Image-to-image arguments of diffusers' pipelines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def img2img_arguments(latents: Tensor, steps: int, strength: float) -> dict[str, Any]:
    """A pipeline runs the share `strength` of the steps, rounded down. So there are enough of them for at least one."""
    return {"image": latents, "strength": strength, "num_inference_steps": max(steps, math.ceil(1 / strength))}
