"""Copy a trained U-Net into the demo model, in float16.   python demo/adopt_unet.py PIPELINE demo/model"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel


def adopt(pipeline: Path, model: Path) -> Path:
    """Replace the U-Net and the noise schedule of `model` with those of `pipeline`."""
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", torch_dtype=torch.float16)
    unet.save_pretrained(model / "unet")
    for file in (model / "unet").iterdir():
        file.chmod(0o644)  # safetensors makes files readable only by their owner
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", model / "scheduler" / "scheduler_config.json")
    return model / "unet"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path, help="the exported pipeline: OUTPUT_DIR/pipeline")
    parser.add_argument("model", type=Path, help="the model folder that gets the U-Net")
    arguments = parser.parse_args()
    print(adopt(arguments.pipeline, arguments.model))
