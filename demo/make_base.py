"""Make the base model from which the demo model's U-Net is trained: a trained VAE, trained text encoders, and a random U-Net.

    python demo/make_base.py --out base

It takes about 20 minutes on one core. The U-Net is then trained with this project's trainer; see demo/README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo import autoencoder, text_encoders
from demo.drawings import VOCABULARY
from helpers.families.miniatures.sdxl import SdxlSizes, build_sdxl, save_sdxl

SIZES = SdxlSizes(
    unet_channels=(32, 64, 64),
    unet_transformers=(1, 1, 1),
    pooled_width=64,
    vae_channels=(24, 48, 64, 64),
    vae_groups=1,  # group norm over all channels; with more groups, plain colors are reproduced badly
)
# A model can only learn the brightness and color of a whole image with zero terminal SNR (Lin et al., 2024).
SCHEDULE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def vocabulary() -> list[str]:
    """The words in the captions of the drawn images and photographs; each becomes one token."""
    captions = [file.read_text(encoding="utf-8") for file in sorted(autoencoder.PHOTOS.glob("*.txt"))]
    return list(dict.fromkeys([*VOCABULARY, *re.findall(r"[a-z]+", " ".join(captions).lower())]))


def make_base(folder: Path, *, vae_steps: int, text_steps: int = 300, seed: int = 0) -> None:
    """Train and write a complete model in diffusers format, as float16 safetensors."""
    pipeline = build_sdxl(seed=seed, vocabulary=vocabulary(), sizes=SIZES, scheduler=SCHEDULE)
    right = text_encoders.train(pipeline, steps=text_steps, seed=seed)
    print(f"text encoders: {right:.0%} of all attributes can be read from their output")
    autoencoder.train(pipeline.vae, steps=vae_steps, seed=seed)
    print(f"vae: mean absolute error {autoencoder.reconstruction_error(pipeline.vae):.4f} of pixels in [-1, 1]")
    save_sdxl(pipeline.to(torch.float16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--vae-steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_base(options.out, vae_steps=options.vae_steps, seed=options.seed)


if __name__ == "__main__":
    main()
