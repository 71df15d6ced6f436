"""Make pictures of a class with the base model, for a regularisation set that keeps what the model can do.

    python -m toolkit.datasets.class_images --pretrained_model_name_or_path MODEL --prompt "a photo of a person" \\
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
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_REFUSED, StorageError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ClassImages:
    """What the pictures are made from. Those of equal settings form one series."""

    model: str  # a folder, or a name on the hub
    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int
    steps: int
    guidance: float
    seed: int

    def picture(self, folder: Path, number: int) -> Path:
        """The file of one picture of the series."""
        settings = hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"class_{settings}_{number:06}.png"


def missing(images: ClassImages, folder: Path, number: int) -> list[int]:
    """The first `number` pictures of the series that are not in the folder. One is there when its caption is there too."""
    files = [images.picture(folder, index) for index in range(number)]
    return [index for index, file in enumerate(files) if not (file.exists() and file.with_suffix(".txt").exists())]


def make(images: ClassImages, pipeline: Any, numbers: Sequence[int], batch: int) -> Iterator[tuple[int, Image]]:
    """The pictures of these numbers, `batch` at a time."""
    import torch

    from helpers.data.draws import seed_of

    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        # Noise is drawn on the CPU: then a picture starts from the same noise on every device and in every batch.
        noise = [torch.Generator().manual_seed(seed_of("class image", images.seed, number)) for number in some]
        negative = {"negative_prompt": [images.negative_prompt] * len(some)} if images.negative_prompt else {}
        made = pipeline(
            prompt=[images.prompt] * len(some),
            width=images.width,
            height=images.height,
            num_inference_steps=images.steps,
            guidance_scale=images.guidance,
            generator=noise,
            **negative,
        ).images
        yield from zip(some, made, strict=True)


def keep(images: ClassImages, folder: Path, number: int, picture: Image) -> None:
    """Put a picture and its caption into the folder, the caption first: a picture that is there has one. Files there stay as they are."""
    from PIL.PngImagePlugin import PngInfo

    from helpers.storage.atomic import write_file

    file, facts, content = images.picture(folder, number), PngInfo(), io.BytesIO()
    for name, value in vars(images).items():
        facts.add_itxt(name, str(value))
    picture.save(content, "PNG", pnginfo=facts)
    for path, data in ((file.with_suffix(".txt"), images.prompt.encode()), (file, content.getvalue())):
        if not path.exists():
            write_file(path, data)


def load_pipeline(model: str, revision: str | None, variant: str | None, dtype: str, device: str) -> Any:
    """The model's own pipeline of diffusers on a device. ModelError where there is none."""
    import diffusers
    import torch
    import transformers

    from helpers.errors import ModelError
    from helpers.families.folder import locate

    folder = locate(model, revision, variant)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16" if device != "cuda" or torch.cuda.is_bf16_supported() else "fp16"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    own = variant if variant and any(folder.rglob(f"*.{variant}*.safetensors")) else None
    diffusers.utils.logging.disable_progress_bar()  # their bars for files of a second would run through ours
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=kind, variant=own, use_safetensors=True, local_files_only=True
        )
        pipeline = pipeline.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded on {device}: {str(error).strip().splitlines()[0]}") from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it answers with black pictures, which would be learnt
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(arguments: argparse.Namespace) -> None:
    from helpers.reporting.console import Console

    width, height = arguments.size
    local = Path(arguments.pretrained_model_name_or_path).expanduser()
    images = ClassImages(
        model=str(local.resolve()) if local.exists() else arguments.pretrained_model_name_or_path,
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        width=width,
        height=height,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
    )
    folder: Path = arguments.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be made or is no folder ({error.strerror}).") from error
    console = Console()
    numbers = missing(images, folder, arguments.number)
    there = arguments.number - len(numbers)
    console.chapter("class", f"{there:,} of {arguments.number:,} pictures of {images.prompt!r} are in {folder}")
    if not numbers:
        return
    pipeline = load_pipeline(images.model, arguments.revision, arguments.variant, arguments.dtype, arguments.device)
    with console.progress("make pictures", len(numbers), "pictures") as advance:
        for number, picture in make(images, pipeline, numbers, arguments.batch):
            keep(images, folder, number, picture)
            advance(1)
    console.chapter("finished", f"{arguments.number:,} pictures in {folder}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m toolkit.datasets.class_images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--pretrained_model_name_or_path", required=True, metavar="MODEL", help="the base model: a diffusers folder or a hub name"
    )
    made.add_argument("--prompt", required=True, type=_words, help="what every picture shows, and its caption")
    made.add_argument("--output_dir", required=True, type=Path, metavar="FOLDER", help="where the pictures go")
    made.add_argument("--number", type=_positive, default=200, help="of pictures that are to be there in the end (200)")
    made.add_argument("--size", type=_size, default=(1024, 1024), help="pixels, as 1024 or 1216x832 (1024)")
    made.add_argument("--seed", type=int, default=42, help="another seed gives other pictures (42)")
    made.add_argument("--batch", type=_positive, default=4, help="pictures made together; more take more memory (4)")
    made.add_argument("--steps", type=_positive, default=30, help="of the sampler, for each picture (30)")
    made.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance (5)")
    made.add_argument("--negative_prompt", default="", help="what no picture is to show")
    made.add_argument("--revision", help="of a model on the hub")
    made.add_argument("--variant", help="of the weights, such as fp16")
    made.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the model (auto: bf16 on a GPU that has it)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    return made


def _words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; say what the pictures show")
    return text.strip()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    edges = text.lower().split("x")
    if len(edges) > 2 or not all(edge.isdecimal() and int(edge) > 0 and int(edge) % 8 == 0 for edge in edges):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1024 or 1216x832, in multiples of 8")
    return int(edges[0]), int(edges[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    try:
        run(chosen)
    except (UserError, StorageError) as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("Stopped; the same command goes on with what is missing.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
