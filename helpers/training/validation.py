"""Validation images, generated before, during and after training, always from the same prompts and noise."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from helpers.data.base.padding import without_padding
from helpers.data.base.sample import Size
from helpers.data.ports import ImageCodec, TextTensors
from helpers.errors import ConfigError
from helpers.foreign_json import parse_json
from helpers.protocols import Img2ImgFamily, ModelFamily, Trainable, ValidationImage, can_img2img
from helpers.storage.atomic import write_file
from helpers.training.prompt_library import PROMPTS
from helpers.training.runtime import Runtime, undisturbed

if TYPE_CHECKING:
    from helpers.config.options import ValidationOptions
    from helpers.data.batches import Batch

UNCONDITIONAL = "unconditional"
LONGEST_NAME = 180  # bytes of a prompt's name; with step, size and number a file name must stay below 255


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the short name in its files. A text of None means the unconditional image."""

    name: str
    text: str | None


@dataclass(frozen=True)
class DatasetImage:
    """An image of a dataset that validation starts from (img2img) or, if it has one, whose condition validation follows.

    `text` are the embeddings of its caption; None if those of the prompt are used.
    """

    latents: torch.Tensor  # (C, h, w)
    text: TextTensors | None
    condition: torch.Tensor | None = None  # (3, H, W) in [0, 1] or latents (C, h, w)


@dataclass(frozen=True)
class ValidationInputs:
    """What the validation images of a run are generated from, the same at every step."""

    prompts: Sequence[Prompt]
    sizes: Sequence[Size]  # of images that start from noise
    text: Callable[[str | None], TextTensors]  # embeddings of a prompt; None is the unconditional
    seed: int  # of the noise of the first image of each prompt
    images: Mapping[Prompt, DatasetImage] = field(default_factory=dict)  # for the prompts that have one
    strength: float = 1.0  # of img2img: the share of the noise schedule that the image goes through, in (0, 1]


def first_images(steps: Iterable[Sequence[Batch]], counts: Mapping[str, int]) -> dict[Prompt, DatasetImage]:
    """The first `counts[dataset id]` different images of each dataset in these steps, with their captions as prompts.

    Fewer if the steps have no more. Each step is a list of this process's batches; no more steps are read than needed.
    """
    images: dict[Prompt, DatasetImage] = {}
    seen: dict[str, set[str]] = {dataset: set() for dataset in counts}
    batches = itertools.chain.from_iterable(steps)
    while any(len(seen[dataset]) < count for dataset, count in counts.items()) and (batch := next(batches, None)):
        for index, sample in enumerate(batch.samples):
            keys = seen.get(sample.dataset, set())
            if not batch.stands_in and len(keys) < counts.get(sample.dataset, 0) and sample.key not in keys:
                keys.add(sample.key)
                # A batch has no text if the text encoders are trained: then it is encoded when it is needed.
                text = without_padding({name: tensor[index] for name, tensor in batch.text.items()}) or None
                condition = None if batch.condition is None else batch.condition[index]
                images[Prompt(f"picture_{len(images) + 1}", batch.captions[index])] = DatasetImage(batch.latents[index], text, condition)
    return images


def with_prompts_on_first(images: Mapping[Prompt, DatasetImage], prompts: Sequence[Prompt]) -> dict[Prompt, DatasetImage]:
    """The images, preceded by the user's prompts, each with the condition of the first image. No prompts if there is no image."""
    first = [dataclasses.replace(image, text=None) for image in images.values()][:1]
    return {**{prompt: image for prompt in prompts for image in first}, **images}


def read_prompts(options: ValidationOptions) -> list[Prompt]:
    """The prompts in the order of their images: unconditional, built-in library, user library, `--validation_prompt`."""
    named: dict[str, str] = dict(PROMPTS) if options.validation_prompt_library else {}
    if options.user_prompt_library is not None:
        named.update(_library(options.user_prompt_library))
    if options.validation_prompt:
        named["validation"] = options.validation_prompt
    blank = [] if options.validation_disable_unconditional else [Prompt(UNCONDITIONAL, None)]
    return blank + [Prompt(name, text) for name, text in named.items()]


def captions_to_encode(prompts: Sequence[Prompt], options: ValidationOptions, uses_images: bool = False) -> list[str]:
    """The captions that validation needs encoded. `uses_images`: it also generates from dataset images, with their captions."""
    texts = [prompt.text for prompt in prompts if prompt.text]
    return [*texts, options.validation_negative_prompt] if texts or uses_images else []


def _library(path: Path) -> dict[str, str]:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--user_prompt_library: {path} cannot be read: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ConfigError(f"--user_prompt_library: {path} must be a JSON object that maps short names to prompts.")
    odd = [name for name in content if not name or set(name) & set('/\\:*?"<>|') or not name.isprintable() or name.startswith(".")]
    if odd:
        raise ConfigError(f"--user_prompt_library: {path}: {odd[0]!r} cannot be part of a file name.")
    if long := [name for name in content if len(name.encode()) > LONGEST_NAME]:
        raise ConfigError(f"--user_prompt_library: {path}: the name {long[0][:40]!r}... is longer than {LONGEST_NAME} bytes: shorten it.")
    return content


def parse_sizes(text: str | None, trained: Size, alignment: int) -> list[Size]:
    """The sizes of `--validation_resolution`: comma-separated WxH, edge lengths in pixels, or megapixels with a decimal point.

    Rounded to a multiple of `alignment` pixels. Without a setting: `trained`.
    """
    if not text:
        return [trained]
    return [_size(part.strip(), alignment) for part in text.split(",") if part.strip()]


def _size(text: str, alignment: int) -> Size:
    try:
        if "x" in text.lower():
            width, height = (int(side) for side in text.lower().split("x"))
        else:
            width = height = round(math.sqrt(float(text) * 1e6)) if "." in text else int(text)
    except ValueError:
        raise ConfigError(f"--validation_resolution={text}: write 1024x768, 1024 (pixels) or 1.0 (megapixels).") from None
    if min(width, height) < alignment:
        raise ConfigError(f"--validation_resolution={text} is below {alignment} pixels; megapixels need a decimal point (1.0).")
    return Size(*(max(alignment, round(side / alignment) * alignment) for side in (width, height)))


class Validator:
    """Generates the validation images of a step: every prompt at every size, `num_validation_images` times.

    An image starts from noise, or from the prompt's dataset image (img2img). If that has a condition, the image starts from noise and
    follows the condition, which the file shows on the left. `new_sampler` creates diffusers' scheduler for one image. Training is
    bit-identical with and without validation.
    """

    def __init__(
        self,
        options: ValidationOptions,
        family: ModelFamily,
        runtime: Runtime,
        inputs: ValidationInputs,
        new_sampler: Callable[[], Any],
        folder: Path,
    ) -> None:
        self.options = options
        self.family = family
        self.runtime = runtime
        self.inputs = inputs
        self.new_sampler = new_sampler
        self.folder = folder
        self._compiled: Any = None

    def due(self, step: int) -> bool:
        return bool(self.options.validation_steps) and step % self.options.validation_steps == 0

    def missing(self, step: int) -> bool:
        """Whether an image of this step does not exist yet. A run that was stopped during validation generates it when it resumes."""
        return any(not self._path(step, prompt, size, index).is_file() for prompt, size, index in self._planned())

    def run(self, trainable: Trainable, step: int) -> list[ValidationImage]:
        """Generate and write the images of a step. A request to stop ends it after the current image. => the images written"""
        self.folder.mkdir(parents=True, exist_ok=True)
        images = []
        with undisturbed(*trainable.modules.values()), torch.no_grad(), self.family.image_codec(self.runtime.device) as codec:
            for prompt, size, index in self._planned():
                if self.runtime.stop.asked:
                    break
                path = self._path(step, prompt, size, index)
                image = codec.decode(self._latents(trainable, prompt, size, index))
                _write_png(torch.cat([*self._shown_condition(prompt, codec), image], dim=-1), path)
                images.append(ValidationImage(self._name(prompt, size, index), path))
        return images

    def _planned(self) -> Iterator[tuple[Prompt, Size, int]]:
        for prompt in self.inputs.prompts:
            yield from itertools.product([prompt], self._sizes(prompt), range(self.options.num_validation_images))

    def _sizes(self, prompt: Prompt) -> Sequence[Size]:
        image = self.inputs.images.get(prompt)
        if image is None:
            return self.inputs.sizes
        height, width = (side * self.family.latents.downsampling for side in image.latents.shape[1:])
        return [Size(width, height)]

    def _latents(self, trainable: Trainable, prompt: Prompt, size: Size, index: int) -> torch.Tensor:
        options = self.options
        pipeline = self._pipeline(trainable, self.inputs.images.get(prompt))
        arguments = self._arguments(trainable, prompt, size)
        seed = secrets.randbits(32) if options.validation_randomize else self.inputs.seed + index
        with self.runtime.accelerator.autocast():  # accelerate does this in `forward`, which a ControlNet bypasses
            return pipeline(
                **{name: self._on_device(value) for name, value in arguments.items()},
                guidance_scale=options.validation_guidance,
                **({"guidance_rescale": options.validation_guidance_rescale} if options.validation_guidance_rescale else {}),
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images

    def _pipeline(self, trainable: Trainable, image: DatasetImage | None) -> Any:
        make = self.family.pipeline if image is None or image.condition is not None else self._img2img().img2img_pipeline
        pipeline = make(self._network(trainable), self.new_sampler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _img2img(self) -> Img2ImgFamily:
        assert can_img2img(self.family), "the settings refuse validation images that start from images for other families"
        return self.family

    def _arguments(self, trainable: Trainable, prompt: Prompt, size: Size) -> dict[str, Any]:
        """The pipeline's arguments for one image: text embeddings, size, and the dataset image or condition."""
        image, steps = self.inputs.images.get(prompt), self.options.validation_num_inference_steps
        negative = self.inputs.text(self.options.validation_negative_prompt if prompt.text else None)
        text = image.text if image and image.text is not None else self.inputs.text(prompt.text)
        arguments = self.family.prompt_arguments(text, negative)
        if image and image.condition is None:
            return arguments | self._img2img().img2img_arguments(image.latents.unsqueeze(0), steps, self.inputs.strength)
        arguments |= {"width": size.width, "height": size.height, "num_inference_steps": steps}
        if image and image.condition is not None:
            condition = image.condition.unsqueeze(0).to(self.runtime.device)
            arguments[trainable.denoiser.argument] = trainable.denoiser.prepared(condition)
        return arguments

    def _shown_condition(self, prompt: Prompt, codec: ImageCodec) -> list[torch.Tensor]:
        """The condition that an image follows, if any, as pixels (1, 3, H, W) in [-1, 1]."""
        image = self.inputs.images.get(prompt)
        if image is None or image.condition is None:
            return []
        condition = image.condition.unsqueeze(0).cpu()
        return [condition * 2 - 1 if condition.shape[-2:] != image.latents.shape[-2:] else codec.decode(condition)]

    def _on_device(self, value: object) -> object:
        return value.to(self.runtime.device, torch.float32) if isinstance(value, torch.Tensor) else value

    def _network(self, trainable: Trainable) -> Any:
        """The network, compiled once if the user wants that. A compiled network uses the current weights."""
        if not self.options.validation_torch_compile:
            return trainable.denoiser
        if self._compiled is None:
            self._compiled = torch.compile(trainable.denoiser, mode=self.options.validation_torch_compile_mode)
        return self._compiled

    def _path(self, step: int, prompt: Prompt, size: Size, index: int) -> Path:
        return self.folder / f"step_{step}_{self._name(prompt, size, index)}.png"

    def _name(self, prompt: Prompt, size: Size, index: int) -> str:
        number = f"_{index + 1}" if self.options.num_validation_images > 1 else ""
        return f"{prompt.name}_{size}{number}"


def _write_png(pixels: torch.Tensor, path: Path) -> None:
    """pixels (1, 3, H, W) in [-1, 1] => a PNG file, written atomically."""
    array = ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    write_file(path, encoded.getvalue())
