"""Train the demo's VAE: it encodes drawn shapes to 8 times smaller latents, with edges as sharp as a few minutes on one core allow."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffusers import AutoencoderKL

from demo.drawings import COLORS, SIZE_PX, SUPERSAMPLING, draw, random_scene

PHOTOS = Path(__file__).parent / "photos"
LATENT_NOISE = 0.08  # standard deviation of the noise on latents of about unit variance; makes the decoder tolerate a denoiser's errors
BATCH = 32
LEARNING_RATE = 2e-3


def train(vae: AutoencoderKL, *, steps: int, seed: int = 0) -> None:
    """Train in place, then set the scaling factor so that latents have unit variance.

    Most steps use 32-pixel crops, so four times as many images fit into the same time. The last fifth of the steps uses whole images.
    """
    vae.to(memory_format=torch.channels_last)  # 20 % faster on a CPU
    _fix_latent_noise(vae)
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    photos = _photos()
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-4, betas=(0.9, 0.98))
    for step in range(steps):
        done = step / steps
        whole = done >= 0.8
        pixels = torch.stack([_example(rng, photos, SIZE_PX if whole else SIZE_PX // 2) for _ in range(BATCH // 2 if whole else BATCH)])
        loss = _loss(vae, pixels.contiguous(memory_format=torch.channels_last), torch_rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"vae: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    vae.to(memory_format=torch.contiguous_format)
    _set_scaling_factor(vae, rng)


def reconstruction_error(vae: AutoencoderKL, *, count: int = 64, seed: int = 1) -> float:
    """Mean absolute error of decoded scenes, for pixels in [-1, 1]."""
    rng = random.Random(seed)
    pixels = torch.stack([to_tensor(draw(random_scene(rng))) for _ in range(count)])
    with torch.no_grad():
        return F.l1_loss(vae.decode(vae.encode(pixels).latent_dist.mean).sample, pixels).item()


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image => (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _fix_latent_noise(vae: AutoencoderKL) -> None:
    """Make the encoder's log-variance constant, so that sampled latents have the noise that the decoder is trained with."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:].zero_()
        vae.quant_conv.bias[channels:].fill_(2 * math.log(LATENT_NOISE))
    keep = torch.ones(2 * channels)
    keep[channels:] = 0
    vae.quant_conv.weight.register_hook(lambda gradient: gradient * keep.view(-1, 1, 1, 1))
    vae.quant_conv.bias.register_hook(lambda gradient: gradient * keep)


def _loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """L1 loss of pixels and of their differences (edges), plus a small penalty that pulls latents towards unit variance."""
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    edges = sum((F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3)), torch.zeros(()))
    return F.l1_loss(decoded, pixels) + 0.5 * edges + 2e-3 * posterior.mean.square().mean()


def _set_scaling_factor(vae: AutoencoderKL, rng: random.Random) -> None:
    pixels = torch.stack([to_tensor(draw(random_scene(rng))) for _ in range(256)])
    with torch.no_grad():
        spread = vae.encode(pixels).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))


def _example(rng: random.Random, photos: list[Image.Image], size_px: int) -> Tensor:
    """A training crop (3, size, size): mostly the demo's scenes, some random drawings, a few photographs."""
    kind = rng.random()
    if kind < 0.7:
        image = draw(random_scene(rng))
    elif kind < 0.97:
        image = _doodle(rng)
    else:
        image = _photo_part(rng, rng.choice(photos))
    left, top = (rng.randint(0, SIZE_PX - size_px) for _ in range(2))
    image = image.crop((left, top, left + size_px, top + size_px))
    return to_tensor(image)


def _doodle(rng: random.Random) -> Image.Image:
    """One to three random polygons and ellipses in any colors, so that the VAE can decode shapes the base model does not know."""
    side = SIZE_PX * SUPERSAMPLING
    colors = list(COLORS.values())

    def color() -> tuple[int, ...]:
        return rng.choice(colors) if rng.random() < 0.7 else tuple(rng.randrange(256) for _ in range(3))

    image = Image.new("RGB", (side, side), color())
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 3)):
        x, y, radius = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.1, 0.4) * side
        corners, turn = rng.randint(2, 12), rng.uniform(0, 2 * math.pi)
        if corners == 2:
            canvas.ellipse((x - radius, y - radius, x + radius, y + rng.uniform(0.3, 1) * radius), fill=color())
        else:
            angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
            reach = [radius * rng.uniform(0.3, 1) for _ in angles]
            canvas.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, reach, strict=True)], fill=color())
    return image.reduce(SUPERSAMPLING)


def _photos() -> list[Image.Image]:
    files = sorted(file for file in PHOTOS.iterdir() if file.suffix != ".txt")
    return [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]


def _photo_part(rng: random.Random, photo: Image.Image) -> Image.Image:
    side = rng.randint(SIZE_PX, min(photo.size))
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    return photo.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
