"""What programs that make pictures have in common: their arguments and exit codes, a pipeline of diffusers, noise, and its sampling."""

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
    """What a pipeline is made of, each by a folder or its name on the hub."""

    name: str
    revision: str | None = None
    variant: str | None = None
    t5: str | None = None  # in place of its own
    vae: str | None = None  # likewise


@dataclass(frozen=True)
class Wanted:
    """What pictures show, and how they are made."""

    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int
    steps: int
    guidance: float

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Wanted:
        """What `--prompt` and the arguments of `add_sampling` say."""
        width, height = arguments.size
        return cls(arguments.prompt, arguments.negative_prompt, width, height, arguments.steps, arguments.guidance)


def load_pipeline(model: Model, dtype: str, device: str, **parts: Any) -> Any:
    """The model's own pipeline of diffusers on a device, with these `parts` in place of its own.

    Raises ModelError where there is none, or none that has a T5.
    """
    import diffusers
    import transformers

    from helpers.families.loading.components import load_component
    from helpers.families.loading.folder import locate, locate_component, model_index
    from helpers.families.loading.locate import T5_CLASSES

    folder = locate(model.name, model.revision, model.variant, T5_CLASSES if model.t5 else ())
    device, kind = _settled(device, dtype)
    own = model.variant if model.variant and any(folder.rglob(f"*.{model.variant}*.safetensors")) else None
    diffusers.utils.logging.disable_progress_bar()  # their bars for files of a second would run through ours
    transformers.utils.logging.disable_progress_bar()
    if model.t5:
        parts = {**_t5_parts(folder, model.t5, model.variant, kind, parts), **parts}
    if model.vae and "vae" not in parts:
        found = locate_component("--pretrained_vae_model_name_or_path", model.vae, "vae")
        parts["vae"] = load_component(diffusers.AutoencoderKL, found, "", kind, model.variant)
    absent = dict.fromkeys(name for name, value in model_index(folder).items() if value == [None, None])  # diffusers insists on hearing it
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=kind, variant=own, use_safetensors=True, local_files_only=True, **{**absent, **parts}
        )
        pipeline = pipeline.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded on {device}: {str(error).strip().splitlines()[0]}") from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it answers with black pictures, which would be learnt
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _settled(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """The device and the precision that `auto` means on this machine."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16" if device != "cuda" or torch.cuda.is_bf16_supported() else "fp16"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _t5_parts(folder: Path, name: str, variant: str | None, dtype: torch.dtype, others: Container[str]) -> dict[str, Any]:
    """The T5 of this name and its tokenizer, as the parts of a model's pipeline; none if they are among `others`.

    Raises ModelError where the pipeline has no T5, or one of another width.
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
    """Of one picture, drawn on the CPU: then it starts from the same noise on every device and in every batch."""
    import torch

    from helpers.data.base.draws import seed_of

    return torch.Generator().manual_seed(seed_of(purpose, seed, number))


def sample(pipeline: Any, wanted: Wanted, generators: Sequence[torch.Generator]) -> list[Image]:
    """A picture of this very size from each generator. UserError where the model makes none of this size.

    An empty negative prompt is left to the pipeline, which may have zeros for it, as SDXL does, and not an encoded "".
    """
    taken = inspect.signature(pipeline.__call__).parameters
    if "image" in taken:
        raise UserError(
            "This model makes pictures from pictures; name one that makes them from a prompt alone, such as the base of a refiner."
        )
    grid = 8 * _patch(pipeline)
    if wanted.width % grid or wanted.height % grid:
        raise UserError(f"--size: this model makes pictures whose sides are multiples of {grid}, and not {wanted.width}x{wanted.height}.")
    exactly = {"use_resolution_binning": False} if "use_resolution_binning" in taken else {}  # or the size is rounded to another
    number = len(generators)
    return pipeline(
        prompt=[wanted.prompt] * number,
        width=wanted.width,
        height=wanted.height,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance,
        generator=list(generators),
        **({"negative_prompt": [wanted.negative_prompt] * number} if wanted.negative_prompt else {}),
        **exactly,
    ).images


def _patch(pipeline: Any) -> int:
    """The edge in latent pixels of what is one token to the network, which has to divide the latents' edges."""
    network = getattr(pipeline, "transformer", None)
    return 1 if network is None else int(network.config.patch_size)


def make_folder(folder: Path) -> None:
    """The folder of --output_dir. UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be made or is no folder ({error.strerror}).") from error


def exit_code(work: Callable[[], None], when_stopped: str = "") -> int:
    """Do the work of a program and say how it ended by its exit code, and on stderr why, where it did not finish."""
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
    """The arguments that say how pictures are made: `number` of them by default, which are `what`."""
    parser.add_argument("--number", type=_positive, default=number, help=f"{what} ({number})")
    parser.add_argument("--size", type=_size, default=(1024, 1024), help="pixels, as 1024 or 1216x832 (1024)")
    parser.add_argument("--seed", type=int, default=42, help="another seed gives other pictures (42)")
    parser.add_argument("--steps", type=_positive, default=30, help="of the sampler, for each picture (30)")
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance (5)")
    parser.add_argument("--negative_prompt", default="", help="what no picture is to show")
    parser.add_argument("--batch", type=_positive, default=4, help="pictures made together; more take more memory (4)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the model (auto: bf16 on a GPU that has it)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")


def words(text: str) -> str:
    """A prompt, as an argument."""
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
