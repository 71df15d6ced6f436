"""Draw the demo's captioned images: one colored shape on a colored background, such as "a red circle on a blue background".

python demo/drawings.py --out images --count 1000            the shapes that the base model knows
python demo/drawings.py --out concept --count 40 --concept     the shape that it has never seen
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE_PX = 64
SUPERSAMPLING = 4  # drawn larger and averaged, for smooth edges
RADIUS_PX = (16.0, 24.0)
WANDER_PX = 7.0  # largest distance of a shape from the center

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (252, 222, 70),
    "green": (38, 158, 72),
    "blue": (38, 92, 218),
    "purple": (132, 52, 170),
    "white": (246, 246, 244),
    "black": (22, 22, 28),
}
SHAPES = ("circle", "square", "triangle")
CONCEPT = "star"  # in the tokenizer's vocabulary, but no model was trained on it
STAR_WAIST = 0.45  # distance of the inner corners from the center, relative to the outer ones
VOCABULARY = ("a", "an", "on", "background", *COLORS, *SHAPES, CONCEPT)


@dataclass(frozen=True)
class Scene:
    """The content of one image. Positions and sizes are in pixels of a 64 x 64 image."""

    shape: str
    foreground: str
    background: str
    center: tuple[float, float] = (SIZE_PX / 2, SIZE_PX / 2)
    radius: float = 20.0

    @property
    def caption(self) -> str:
        article = "an" if self.foreground[0] in "aeiou" else "a"
        return f"{article} {self.foreground} {self.shape} on a {self.background} background"


def random_scene(rng: random.Random, shapes: Sequence[str] = SHAPES, colors: tuple[str, str] | None = None) -> Scene:
    """A shape of random size near the center, in the given colors (foreground, background) or in two random ones."""
    foreground, background = colors or rng.sample(list(COLORS), 2)
    radius = rng.uniform(*RADIUS_PX)
    room = min(SIZE_PX / 2 - radius - 2, WANDER_PX)
    center = (SIZE_PX / 2 + rng.uniform(-room, room), SIZE_PX / 2 + rng.uniform(-room, room))
    return Scene(rng.choice(list(shapes)), foreground, background, center, radius)


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB image with smooth edges."""
    big = Image.new("RGB", (SIZE_PX * SUPERSAMPLING,) * 2, COLORS[scene.background])
    x, y, radius = (SUPERSAMPLING * number for number in (*scene.center, scene.radius))
    draw_shape(ImageDraw.Draw(big), scene.shape, (x - radius, y - radius, x + radius, y + radius), COLORS[scene.foreground])
    return big.reduce(SUPERSAMPLING)


def draw_shape(canvas: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float, float], color: tuple[int, int, int] | int) -> None:
    """Draw a shape that touches all four sides of `box` (left, top, right, bottom)."""
    if shape == "circle":
        canvas.ellipse(box, fill=color)
    else:
        left, top, right, bottom = box
        corners = _corners(shape)
        canvas.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in corners], fill=color)


def _corners(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape that fills the unit square, y downwards."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "star":
        points = [(math.pi * corner / 5, STAR_WAIST if corner % 2 else 1.0) for corner in range(10)]
        raw = [(reach * math.sin(turn), -reach * math.cos(turn)) for turn, reach in points]
        (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*raw, strict=True))
        return [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in raw]
    raise ValueError(f"no such shape: {shape}")


def write_drawings(folder: Path, count: int, *, seed: int = 0, shapes: Sequence[str] = SHAPES) -> None:
    """Write `count` PNG images, each with its caption in a .txt file. The same seed draws the same images.

    It uses every color pair once, in random order, before it repeats one, so that a small dataset has many different pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pairs = list(itertools.permutations(COLORS, 2))
    rng.shuffle(pairs)
    for number, colors in zip(range(count), itertools.cycle(pairs), strict=False):
        scene = random_scene(rng, shapes, colors)
        name = f"{number:0{len(str(count - 1))}d}-{scene.foreground}-{scene.shape}-on-{scene.background}"
        draw(scene).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concept", action="store_true", help=f"draw only the shape that the base model does not know: {CONCEPT}")
    options = parser.parse_args()
    write_drawings(options.out, options.count, seed=options.seed, shapes=(CONCEPT,) if options.concept else SHAPES)
    print(f"{options.count:,} images with captions in {options.out}")


if __name__ == "__main__":
    main()
