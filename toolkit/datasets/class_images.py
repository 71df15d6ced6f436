"""Generate images of a class with the base model, as regularization images (prior preservation).

    ./simpletuner class-images --pretrained_model_name_or_path MODEL --prompt "a photo of a person" \\
        --number 200 --output_dir /data/class_person

Each image is a PNG with its prompt in a .txt file next to it. The file name contains a hash of the settings and the image's number, and
image n always starts from the same noise. So an interrupted command continues when it is repeated, a larger --number adds images, other
settings make other files, and no file is ever replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.generation import ImageSettings, Model, add_sampling, exit_code, load_pipeline, make_folder, noise, prompt, sample

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ClassImages:
    """What the images are generated from. Images with equal settings form one series."""

    model: str  # a folder or a hub name
    image_settings: ImageSettings
    seed: int
    t5: str | None = None  # a folder or a hub name, if not the model's own T5

    @property
    def settings(self) -> dict[str, Any]:
        values = {"model": self.model, **vars(self.image_settings), "seed": self.seed, "t5": self.t5}
        return {name: value for name, value in values.items() if value is not None}

    def file(self, folder: Path, number: int) -> Path:
        """The file of one image of the series."""
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"class_{settings}_{number:06}.png"


def missing(images: ClassImages, folder: Path, number: int) -> list[int]:
    """The indexes below `number` of images that are not in the folder. An image counts only if its caption is there too."""
    files = [images.file(folder, index) for index in range(number)]
    return [index for index, file in enumerate(files) if not (file.exists() and file.with_suffix(".txt").exists())]


def make(images: ClassImages, pipeline: Any, numbers: Sequence[int], batch: int) -> Iterator[tuple[int, Image]]:
    """Generate the images with these numbers, `batch` at a time."""
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        made = sample(pipeline, images.image_settings, [noise("class image", images.seed, number) for number in some])
        yield from zip(some, made, strict=True)


def save(images: ClassImages, folder: Path, number: int, image: Image) -> None:
    """Write an image and its caption. The caption is first, so every image has one. Existing files are not replaced."""
    from PIL.PngImagePlugin import PngInfo

    from helpers.storage.atomic import write_file

    file, metadata, content = images.file(folder, number), PngInfo(), io.BytesIO()
    for name, value in images.settings.items():
        metadata.add_itxt(name, str(value))
    image.save(content, "PNG", pnginfo=metadata)
    for path, data in ((file.with_suffix(".txt"), images.image_settings.prompt.encode()), (file, content.getvalue())):
        if not path.exists():
            write_file(path, data)


def run(arguments: argparse.Namespace) -> None:
    from helpers.reporting.console import Console

    t5 = arguments.pretrained_t5_model_name_or_path
    images = ClassImages(
        model=_absolute(arguments.pretrained_model_name_or_path),
        image_settings=ImageSettings.from_arguments(arguments),
        seed=arguments.seed,
        t5=_absolute(t5) if t5 else None,
    )
    folder: Path = arguments.output_dir
    make_folder(folder)
    console = Console()
    numbers = missing(images, folder, arguments.number)
    existing = arguments.number - len(numbers)
    console.chapter("class", f"{existing:,} of {arguments.number:,} images of {images.image_settings.prompt!r} are in {folder}")
    if not numbers:
        return
    base = Model(images.model, arguments.revision, arguments.variant, t5=images.t5)
    pipeline = load_pipeline(base, arguments.dtype, arguments.device)
    with console.progress("generate", len(numbers), "images") as advance:
        for number, image in make(images, pipeline, numbers, arguments.batch):
            save(images, folder, number, image)
            advance(1)
    console.chapter("finished", f"{arguments.number:,} images in {folder}")


def _absolute(model: str) -> str:
    """A hub name unchanged, a folder as an absolute path, so the file names do not depend on the current folder."""
    local = Path(model).expanduser()
    return str(local.resolve()) if local.exists() else model


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="./simpletuner class-images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--pretrained_model_name_or_path", required=True, metavar="MODEL", help="the base model: a diffusers folder or a hub name"
    )
    made.add_argument("--prompt", required=True, type=prompt, help="the prompt of every image, which is also its caption")
    made.add_argument("--output_dir", required=True, type=Path, metavar="FOLDER", help="folder for the images")
    add_sampling(made, number=200, what="total number of images")
    made.add_argument("--pretrained_t5_model_name_or_path", metavar="MODEL", help="the T5 text encoder, if not the base model's own")
    made.add_argument("--revision", help="revision of a model on the hub")
    made.add_argument("--variant", help="variant of the weights, such as fp16")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    return exit_code(lambda: run(chosen), "Stopped; repeat the command to generate the missing images.")
