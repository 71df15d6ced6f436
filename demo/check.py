"""Measure how often a demo model's images show what their prompts ask for, compared with chance.

    python demo/check.py demo/model                              foreground color, background color and shape
    python demo/check.py demo/model --concept --lora FILE        the shape that only the LoRA has learned
    python demo/check.py demo/model --shuffle-captions           must fail: each image is compared with another's prompt

Pictures are judged by counting pixels and matching drawn templates, not by a network. The exit code is 0 when every measure
reaches its threshold, else 1.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo.drawings import COLORS, CONCEPT, SHAPES, SIZE_PX, Scene, draw_shape

ALL_SHAPES = (*SHAPES, CONCEPT)
STEPS = 20
GUIDANCE = 4.0
SMALLEST_SHARE = 0.03  # share of the image; anything smaller is not a shape
LARGEST_FRAME_SHARE = 0.3  # share of the image's border; if more of it differs from the background, the background is not plain
ROUNDINGS = (0.0, 0.05, 0.1)  # corners that a network has slightly rounded still count
SMALLEST_OVERLAP = 0.65  # with a template; anything below is none of the shapes
THRESHOLDS = {"foreground": 0.75, "background": 0.85, "shape": 0.8}
CHANCE = {"foreground": 1 / len(COLORS), "background": 1 / len(COLORS), "shape": 1 / len(SHAPES)}


@dataclass(frozen=True)
class Seen:
    """What an image shows; None for what cannot be recognized."""

    foreground: str | None
    background: str
    shape: str | None


def judge(image: Image.Image) -> Seen:
    """Recognize one shape on a plain background: its color, its kind and the background color, at any position and size."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    edge = max(2, min(pixels.shape[:2]) // 20)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[edge:-edge, edge:-edge] = False
    background = np.median(pixels[frame], axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    # The shape's color is that of the pixels farthest from the background color; its edge is at half that distance.
    mask = distance > max(40.0, np.quantile(distance, 0.95) / 2)
    if mask.mean() < SMALLEST_SHARE or mask[frame].mean() > LARGEST_FRAME_SHARE:
        return Seen(None, _nearest_color(background), None)
    return Seen(_nearest_color(np.median(pixels[mask], axis=0)), _nearest_color(background), _nearest_shape(mask))


def prompts(count: int, *, shapes: Sequence[str] = SHAPES, seed: int = 0) -> list[Scene]:
    """Scenes to prompt for: the shapes in turn, with two different random colors."""
    rng = random.Random(seed)
    pairs = [rng.sample(list(COLORS), 2) for _ in range(count)]
    return [Scene(shapes[number % len(shapes)], foreground, background) for number, (foreground, background) in enumerate(pairs)]


def generate(
    model: Path, scenes: Sequence[Scene], *, lora: Path | None = None, steps: int = STEPS, guidance: float = GUIDANCE
) -> list[Image.Image]:
    """One 64 x 64 image per scene, with diffusers' SDXL pipeline on the CPU. Image n always starts from the noise of seed n."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True, add_watermarker=False)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    return ask(pipeline, scenes, steps=steps, guidance=guidance)


def ask(
    pipeline: Any, scenes: Sequence[Scene], *, steps: int = STEPS, guidance: float = GUIDANCE, first: int = 0, **more: Any
) -> list[Image.Image]:
    """Like `generate`, with a loaded pipeline. Image n starts from the noise of seed `first` + n; `more` are arguments of the pipeline."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(scenes), 16):
        part = scenes[start : start + 16]
        images += pipeline(
            [scene.caption for scene in part],
            height=SIZE_PX,
            width=SIZE_PX,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(first + start + number) for number in range(len(part))],
            **more,
        ).images
    return images


def score(scenes: Sequence[Scene], seen: Sequence[Seen]) -> dict[str, float]:
    """The share of images that show what was requested, for each measure, in [0, 1]."""
    return {
        measure: sum(getattr(scene, measure) == getattr(sight, measure) for scene, sight in zip(scenes, seen, strict=True)) / len(scenes)
        for measure in THRESHOLDS
    }


def shuffled(scenes: Sequence[Scene], seed: int = 0) -> list[Scene]:
    """The same scenes in another order, so that images are compared with the wrong prompts."""
    return random.Random(seed).sample(list(scenes), len(scenes))


def write_sheet(images: Sequence[Image.Image], scenes: Sequence[Scene], seen: Sequence[Seen], file: Path, *, columns: int = 12) -> None:
    """Write all images as one PNG; a red frame marks those that do not show what was requested."""
    cell = SIZE_PX + 8
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * cell), "white")
    for number, (image, scene, sight) in enumerate(zip(images, scenes, seen, strict=True)):
        left, top = number % columns * cell, number // columns * cell
        if any(getattr(scene, measure) != getattr(sight, measure) for measure in THRESHOLDS):
            ImageDraw.Draw(sheet).rectangle((left, top, left + cell - 1, top + cell - 1), fill=(220, 0, 0))
        sheet.paste(image, (left + 4, top + 4))
    sheet.save(file)


def _nearest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLORS[name]))))


def _nearest_shape(mask: np.ndarray) -> str | None:
    """The shape whose template, stretched to the mask's bounding box, overlaps it best (intersection over union), if any does."""
    # Rows and columns with a few stray pixels do not belong to the box.
    rows, columns = (np.flatnonzero(mask.sum(axis=axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return None
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def overlap(shape: str) -> float:
        templates = (_template(shape, box.shape[1], box.shape[0], rounding) for rounding in ROUNDINGS)
        return max(float((box & template).sum() / (box | template).sum()) for template in templates)

    best = max(ALL_SHAPES, key=overlap)
    return best if overlap(best) >= SMALLEST_OVERLAP else None


@functools.cache
def _template(shape: str, width: int, height: int, rounding: float) -> np.ndarray:
    """A shape that fills a box, as a (height, width) mask; `rounding` smooths its corners, as a share of its size."""
    side, margin = 256, 64
    image = Image.new("L", (side + 2 * margin,) * 2)
    draw_shape(ImageDraw.Draw(image), shape, (margin, margin, margin + side - 1, margin + side - 1), 255)
    smooth = image.filter(ImageFilter.GaussianBlur(rounding * side)).point(lambda value: 255 * (value > 127))
    return np.asarray(smooth.crop(smooth.getbbox()).resize((width, height), Image.Resampling.BOX)) > 127


def main() -> int:
    options = _parse()
    scenes = prompts(options.count, shapes=(CONCEPT,) if options.concept else SHAPES)
    images = generate(options.model, scenes, lora=options.lora, steps=options.steps, guidance=options.guidance)
    asked = shuffled(scenes) if options.shuffle_captions else scenes
    seen = [judge(image) for image in images]
    if options.sheet:
        write_sheet(images, asked, seen, options.sheet)
    scores = score(asked, seen)
    for measure, value in scores.items():
        # The concept is one of four shapes that can be seen.
        chance = 1 / len(ALL_SHAPES) if options.concept and measure == "shape" else CHANCE[measure]
        verdict = "ok" if value >= THRESHOLDS[measure] else "too low"
        print(f"{measure:<10} {value:.2f}   chance {chance:.2f}, threshold {THRESHOLDS[measure]:.2f}: {verdict}")
    return int(any(scores[measure] < THRESHOLDS[measure] for measure in THRESHOLDS))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder in diffusers format")
    parser.add_argument("--lora", type=Path, help="a pytorch_lora_weights.safetensors to load on top")
    parser.add_argument("--concept", action="store_true", help=f"prompt for the shape of the LoRA dataset: {CONCEPT}")
    parser.add_argument("--shuffle-captions", action="store_true", help="compare each image with another's prompt")
    parser.add_argument("--sheet", type=Path, help="write all images to this PNG")
    parser.add_argument("--count", type=int, default=48, help="number of images")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="guidance scale")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
