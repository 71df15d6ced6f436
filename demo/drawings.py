"""Draw the demo's captioned images: one colored shape on a colored background, such as "a red circle on a blue background".

python demo/drawings.py --out images --count 1000            the shapes that the base model knows
python demo/drawings.py --out concept --count 40 --concept     the one that it has never seen
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
WANDER_PX = 7.0  # how far from the middle a shape may stand

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
CONCEPT = "star"  # its word is in the tokenizer's vocabulary, but nothing was trained on it
STAR_WAIST = 0.45  # inner corners' distance from the middle, as a share of the outer ones'
VOCABULARY = ("a", "an", "on", "background", *COLORS, *SHAPES, CONCEPT)


@dataclass(frozen=True)
class Scene:
    """What one image shows; positions and sizes in pixels of a 64 x 64 image."""

    shape: str
    foreground: str
    background: str
    centre: tuple[float, float] = (SIZE_PX / 2, SIZE_PX / 2)
    radius: float = 20.0

    @property
    def caption(self) -> str:
        article = "an" if self.foreground[0] in "aeiou" else "a"
        return f"{article} {self.foreground} {self.shape} on a {self.background} background"


def random_scene(rng: random.Random, shapes: Sequence[str] = SHAPES, colours: tuple[str, str] | None = None) -> Scene:
    """A shape of any size somewhere near the middle, in the given colors (foreground, background) or in two random ones."""
    foreground, background = colours or rng.sample(list(COLORS), 2)
    radius = rng.uniform(*RADIUS_PX)
    room = min(SIZE_PX / 2 - radius - 2, WANDER_PX)
    centre = (SIZE_PX / 2 + rng.uniform(-room, room), SIZE_PX / 2 + rng.uniform(-room, room))
    return Scene(rng.choice(list(shapes)), foreground, background, centre, radius)


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB image with smooth edges."""
    big = Image.new("RGB", (SIZE_PX * SUPERSAMPLING,) * 2, COLORS[scene.background])
    x, y, radius = (SUPERSAMPLING * number for number in (*scene.centre, scene.radius))
    draw_shape(ImageDraw.Draw(big), scene.shape, (x - radius, y - radius, x + radius, y + radius), COLORS[scene.foreground])
    return big.reduce(SUPERSAMPLING)


def draw_shape(canvas: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float, float], colour: tuple[int, int, int] | int) -> None:
    """Draw a shape so that it touches all four sides of `box` (left, top, right, bottom)."""
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    else:
        left, top, right, bottom = box
        corners = _corners(shape)
        canvas.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in corners], fill=colour)


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
    """Write `count` PNG images, each with its caption in a .txt file beside it; the same seed draws the same images.

    Pairs of colors come in turn, in random order, so that a small set has as many different ones as it can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pairs = list(itertools.permutations(COLORS, 2))
    rng.shuffle(pairs)
    for number, colours in zip(range(count), itertools.cycle(pairs), strict=False):
        scene = random_scene(rng, shapes, colours)
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
