"""All validation images of a run on one sheet: a row for each prompt and size, a column for each step."""

from __future__ import annotations

import io
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from helpers.storage.atomic import write_file

SHEET = "contact_sheet.png"
_NAME = re.compile(r"step_(\d+)_(.+_\d+x\d+(?:_\d+)?)\.png")
MOST_COLUMNS = 12
CELL = 192  # longer side of an image on the sheet, in pixels
MARGIN, LABEL = 8, 18


def write_contact_sheet(folder: Path) -> Path | None:
    """Write contact_sheet.png from the images in `folder`; None if there are none.

    Of many steps, it shows an even selection that includes the first and the last.
    """
    images: dict[str, dict[int, Path]] = {}
    for path in folder.glob("step_*.png"):
        if match := _NAME.fullmatch(path.name):
            images.setdefault(match[2], {})[int(match[1])] = path
    if not images:
        return None
    steps = _spread(sorted({step for row in images.values() for step in row}), MOST_COLUMNS)
    sheet = Image.new("RGB", (MARGIN + len(steps) * (CELL + MARGIN), LABEL + len(images) * (CELL + LABEL + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, step in enumerate(steps):
        draw.text((MARGIN + column * (CELL + MARGIN), 2), f"step {step:,}", "black", font)
    for row, (name, by_step) in enumerate(sorted(images.items())):
        top = LABEL + MARGIN + row * (CELL + LABEL + MARGIN)
        draw.text((MARGIN, top - 4), name.replace("_", " "), "dimgray", font)
        for column, step in enumerate(steps):
            if step in by_step:
                sheet.paste(_thumbnail(by_step[step]), (MARGIN + column * (CELL + MARGIN), top + LABEL - MARGIN))
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    write_file(folder / SHEET, encoded.getvalue())
    return folder / SHEET


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _spread(steps: list[int], most: int) -> list[int]:
    if len(steps) <= most:
        return steps
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]
