"""Make pictures of a class with the base model, for a regularisation set that keeps what the model can do.

    ./simpletuner class-images --pretrained_model_name_or_path MODEL --prompt "a photo of a person" \\
        --number 200 --output_dir /data/class_person

Each picture is a PNG with its prompt beside it in a .txt. Its name tells the settings (a hash of them) and its number, and number n
always starts from the same noise. So the same command goes on where it was stopped, a larger --number adds pictures, other settings
make other files, and no file is ever replaced.
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

from toolkit.pictures import Model, Wanted, add_sampling, exit_code, load_pipeline, make_folder, noise, sample, words

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ClassImages:
    """What the pictures are made from. Those of equal settings form one series."""

    model: str  # a folder, or a name on the hub
    wanted: Wanted
    seed: int
    t5: str | None = None  # the same of T5, where it is not the model's own

    @property
    def settings(self) -> dict[str, Any]:
        told = {"model": self.model, **vars(self.wanted), "seed": self.seed, "t5": self.t5}
        return {name: value for name, value in told.items() if value is not None}

    def picture(self, folder: Path, number: int) -> Path:
        """The file of one picture of the series."""
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"class_{settings}_{number:06}.png"


def missing(images: ClassImages, folder: Path, number: int) -> list[int]:
    """The first `number` pictures of the series that are not in the folder. One is there when its caption is there too."""
    files = [images.picture(folder, index) for index in range(number)]
    return [index for index, file in enumerate(files) if not (file.exists() and file.with_suffix(".txt").exists())]


def make(images: ClassImages, pipeline: Any, numbers: Sequence[int], batch: int) -> Iterator[tuple[int, Image]]:
    """The pictures of these numbers, `batch` at a time."""
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        made = sample(pipeline, images.wanted, [noise("class image", images.seed, number) for number in some])
        yield from zip(some, made, strict=True)


def keep(images: ClassImages, folder: Path, number: int, picture: Image) -> None:
    """Put a picture and its caption into the folder, the caption first: a picture that is there has one. Files there stay as they are."""
    from PIL.PngImagePlugin import PngInfo

    from helpers.storage.atomic import write_file

    file, facts, content = images.picture(folder, number), PngInfo(), io.BytesIO()
    for name, value in images.settings.items():
        facts.add_itxt(name, str(value))
    picture.save(content, "PNG", pnginfo=facts)
    for path, data in ((file.with_suffix(".txt"), images.wanted.prompt.encode()), (file, content.getvalue())):
        if not path.exists():
            write_file(path, data)


def run(arguments: argparse.Namespace) -> None:
    from helpers.reporting.console import Console

    t5 = arguments.pretrained_t5_model_name_or_path
    images = ClassImages(
        model=_as_named(arguments.pretrained_model_name_or_path),
        wanted=Wanted.of(arguments),
        seed=arguments.seed,
        t5=_as_named(t5) if t5 else None,
    )
    folder: Path = arguments.output_dir
    make_folder(folder)
    console = Console()
    numbers = missing(images, folder, arguments.number)
    there = arguments.number - len(numbers)
    console.chapter("class", f"{there:,} of {arguments.number:,} pictures of {images.wanted.prompt!r} are in {folder}")
    if not numbers:
        return
    base = Model(images.model, arguments.revision, arguments.variant, t5=images.t5)
    pipeline = load_pipeline(base, arguments.dtype, arguments.device)
    with console.progress("make pictures", len(numbers), "pictures") as advance:
        for number, picture in make(images, pipeline, numbers, arguments.batch):
            keep(images, folder, number, picture)
            advance(1)
    console.chapter("finished", f"{arguments.number:,} pictures in {folder}")


def _as_named(model: str) -> str:
    """A hub name as it is, a folder by its whole path: the series does not depend on where the command was typed."""
    local = Path(model).expanduser()
    return str(local.resolve()) if local.exists() else model


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="./simpletuner class-images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--pretrained_model_name_or_path", required=True, metavar="MODEL", help="the base model: a diffusers folder or a hub name"
    )
    made.add_argument("--prompt", required=True, type=words, help="what every picture shows, and its caption")
    made.add_argument("--output_dir", required=True, type=Path, metavar="FOLDER", help="where the pictures go")
    add_sampling(made, number=200, what="of pictures that are to be there in the end")
    made.add_argument(
        "--pretrained_t5_model_name_or_path", metavar="MODEL", help="the T5 that reads the prompt, where it is not the base model's own"
    )
    made.add_argument("--revision", help="of a model on the hub")
    made.add_argument("--variant", help="of the weights, such as fp16")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    return exit_code(lambda: run(chosen), "Stopped; the same command goes on with what is missing.")
