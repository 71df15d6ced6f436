"""Shared by the programs that generate images: arguments, exit codes, loading a diffusers pipeline, noise, sampling."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from helpers.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_REFUSED, ModelError, StorageError, UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Model:
    """The parts of a pipeline, each as a folder or a hub name."""

    name: str
    revision: str | None = None
    variant: str | None = None
    t5: str | None = None  # replaces the model's own T5
    vae: str | None = None  # replaces the model's own VAE


@dataclass(frozen=True)
class ImageSettings:
    """The settings of the images to generate."""

    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int
    steps: int
    guidance: float

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ImageSettings:
        """From `--prompt` and the arguments of `add_sampling`."""
        width, height = arguments.size
        return cls(arguments.prompt, arguments.negative_prompt, width, height, arguments.steps, arguments.guidance)


def load_pipeline(model: Model, dtype: str, device: str, **parts: Any) -> Any:
    """The model's diffusers pipeline on a device, with `parts` instead of its own.

    Raises ModelError if it cannot be loaded, or if a T5 is given and the pipeline has none.
    """
    import diffusers
    import transformers

    from helpers.families.loading.components import load_component
    from helpers.families.loading.folder import locate, locate_component, model_index
    from helpers.families.loading.locate import T5_CLASSES

    folder = locate(model.name, model.revision, model.variant, T5_CLASSES if model.t5 else ())
    device, kind = _resolve(device, dtype)
    own = model.variant if model.variant and any(folder.rglob(f"*.{model.variant}*.safetensors")) else None
    diffusers.utils.logging.disable_progress_bar()  # their short progress bars would disturb ours
    transformers.utils.logging.disable_progress_bar()
    if model.t5:
        parts = {**_t5_parts(folder, model.t5, model.variant, kind, parts), **parts}
    if model.vae and "vae" not in parts:
        found = locate_component("--pretrained_vae_model_name_or_path", model.vae, "vae")
        parts["vae"] = load_component(diffusers.AutoencoderKL, found, "", kind, model.variant)
    absent = dict.fromkeys(
        name for name, value in model_index(folder).items() if value == [None, None]
    )  # diffusers wants absent parts passed explicitly
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=kind, variant=own, use_safetensors=True, local_files_only=True, **{**absent, **parts}
        )
        pipeline = pipeline.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded on {device}: {str(error).strip().splitlines()[0]}") from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it replaces images with black ones, which would be trained on
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _resolve(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """Device and precision, with `auto` replaced by the best choice for this machine."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16" if device != "cuda" or torch.cuda.is_bf16_supported() else "fp16"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _t5_parts(folder: Path, name: str, variant: str | None, dtype: torch.dtype, others: Container[str]) -> dict[str, Any]:
    """The T5 with this name and its tokenizer, as parts of the model's pipeline; {} if `others` already has a T5.

    Raises ModelError if the pipeline has no T5, or one of another width.
    """
    import diffusers
    from transformers import T5EncoderModel, T5TokenizerFast

    from helpers.families.loading.components import load_component
    from helpers.families.loading.folder import model_index, read_json
    from helpers.families.text.t5_source import OPTION, locate, require_width, width_read

    pipeline = model_index(folder)["_class_name"]
    taken = inspect.signature(getattr(diffusers, pipeline).__init__).parameters.values()
    names = {kind: part.name for part in taken for kind in (part.annotation, *get_args(part.annotation))}
    if T5EncoderModel not in names:
        raise ModelError(f"{OPTION}: a {pipeline} has no T5; remove it.")
    if names[T5EncoderModel] in others:
        return {}
    encoder, tokenizer = locate(name, variant)
    for network in (path for part in ("transformer", "unet") if (path := folder / part / "config.json").is_file()):
        if width := width_read(read_json(network)):
            require_width(encoder, width, str(folder))
    return {
        names[T5EncoderModel]: load_component(T5EncoderModel, encoder, "", dtype, variant),
        names[T5TokenizerFast]: T5TokenizerFast.from_pretrained(tokenizer, local_files_only=True),
    }


def noise(purpose: str, seed: int, number: int) -> torch.Generator:
    """The noise generator of one image, on the CPU: so the noise is the same on every device and in every batch."""
    import torch

    from helpers.data.base.draws import seed_of

    return torch.Generator().manual_seed(seed_of(purpose, seed, number))


def sample(pipeline: Any, settings: ImageSettings, generators: Sequence[torch.Generator]) -> list[Image]:
    """One image of exactly this size for each generator. UserError if the model cannot generate this size.

    An empty negative prompt is not passed to the pipeline, because some pipelines use zeros for it, as SDXL's does, and not an encoded "".
    """
    taken = inspect.signature(pipeline.__call__).parameters
    if "image" in taken:
        raise UserError(
            "This model needs an input image (img2img); name one that only needs a prompt, such as the base model of a refiner."
        )
    grid = 8 * _patch(pipeline)
    if settings.width % grid or settings.height % grid:
        raise UserError(f"--size: the sides must be multiples of {grid} for this model, not {settings.width}x{settings.height}.")
    exactly = {"use_resolution_binning": False} if "use_resolution_binning" in taken else {}  # otherwise the pipeline rounds the size
    number = len(generators)
    return pipeline(
        prompt=[settings.prompt] * number,
        width=settings.width,
        height=settings.height,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=list(generators),
        **({"negative_prompt": [settings.negative_prompt] * number} if settings.negative_prompt else {}),
        **exactly,
    ).images


def _patch(pipeline: Any) -> int:
    """The side of a transformer's patch in latent pixels (1 for a U-Net). The sides of the latents must be multiples of it."""
    network = getattr(pipeline, "transformer", None)
    return 1 if network is None else int(network.config.patch_size)


def make_folder(folder: Path) -> None:
    """Create the folder of --output_dir. UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be created or is not a folder ({error.strerror}).") from error


def exit_code(work: Callable[[], None], when_stopped: str = "") -> int:
    """Do a program's work and return its exit code. If it does not finish, print the reason to stderr."""
    try:
        work()
    except (UserError, StorageError) as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, UserError) else EXIT_FAULT
    except KeyboardInterrupt:
        if when_stopped:
            print(when_stopped, file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FINISHED


def add_sampling(parser: argparse.ArgumentParser, *, number: int, what: str) -> None:
    """Add the arguments of image generation. `number` is the default of --number, and `what` its help text."""
    parser.add_argument("--number", type=_positive, default=number, help=f"{what} ({number})")
    parser.add_argument("--size", type=_size, default=(1024, 1024), help="pixels, as 1024 or 1216x832 (1024)")
    parser.add_argument("--seed", type=int, default=42, help="another seed gives other images (42)")
    parser.add_argument("--steps", type=_positive, default=30, help="sampling steps for each image (30)")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance scale (5)")
    parser.add_argument("--negative_prompt", default="", help="what the images should not show")
    parser.add_argument("--batch", type=_positive, default=4, help="batch size; more needs more VRAM (4)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the model (auto: bf16 on a GPU that supports it)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")


def prompt(text: str) -> str:
    """The type of --prompt."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; describe the images")
    return text.strip()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    edges = text.lower().split("x")
    if len(edges) > 2 or not all(edge.isdecimal() and int(edge) > 0 and int(edge) % 8 == 0 for edge in edges):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in multiples of 8, such as 1024 or 1216x832")
    return int(edges[0]), int(edges[-1])
