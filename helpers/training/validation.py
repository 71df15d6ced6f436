"""Pictures made before, during and after training, always from the same prompts and noise."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
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
from helpers.protocols import Img2ImgFamily, ModelFamily, Trainable, ValidationImage, can_img2img
from helpers.storage.atomic import write_file
from helpers.training.prompt_library import PROMPTS
from helpers.training.runtime import Runtime, undisturbed

if TYPE_CHECKING:
    from helpers.config.options import ValidationOptions
    from helpers.data.batches import Batch

UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class Prompt:
    """A prompt with the short name its files carry; None asks for the picture of no prompt at all."""

    name: str
    text: str | None


@dataclass(frozen=True)
class Start:
    """A picture of the data that a picture begins with, or whose condition it follows, where it has one.

    `text` is what its caption became; None where the prompt's own words count.
    """

    latents: torch.Tensor  # (C, h, w)
    text: TextTensors | None
    condition: torch.Tensor | None = None  # (3, H, W) in [0, 1] or latents (C, h, w)


@dataclass(frozen=True)
class Subjects:
    """What the pictures of a run are of, the same at every step."""

    prompts: Sequence[Prompt]
    sizes: Sequence[Size]  # of pictures that begin with noise alone
    text: Callable[[str | None], TextTensors]  # what the network is told of a prompt, None being the unconditional
    starts: Mapping[Prompt, Start] = field(default_factory=dict)
    strength: float = 1.0  # how much of the schedule pictures go back to that begin with pictures


def first_pictures(steps: Iterable[Sequence[Batch]], counts: Mapping[str, int]) -> dict[Prompt, Start]:
    """The first samples of some steps, as prompts with the pictures to begin with: so many of each data set, by its id.

    Fewer where the steps have no more. Each step is this process's batches; no further one is asked for than is needed.
    """
    found: dict[Prompt, Start] = {}
    seen: dict[str, set[str]] = {dataset: set() for dataset in counts}
    batches = itertools.chain.from_iterable(steps)
    while any(len(seen[dataset]) < count for dataset, count in counts.items()) and (batch := next(batches, None)):
        for index, sample in enumerate(batch.samples):
            keys = seen.get(sample.dataset, set())
            if not batch.stands_in and len(keys) < counts.get(sample.dataset, 0) and sample.key not in keys:
                keys.add(sample.key)
                text = (
                    without_padding({name: tensor[index] for name, tensor in batch.text.items()}) or None
                )  # of trained encoders there is none to keep
                condition = None if batch.condition is None else batch.condition[index]
                found[Prompt(f"picture_{len(found) + 1}", batch.captions[index])] = Start(batch.latents[index], text, condition)
    return found


def after_the_first(starts: Mapping[Prompt, Start], prompts: Sequence[Prompt]) -> dict[Prompt, Start]:
    """The same, and before them the user's prompts, each with the condition of the first of these pictures; none where there is none."""
    first = [dataclasses.replace(start, text=None) for start in starts.values()][:1]
    return {**{prompt: start for prompt in prompts for start in first}, **starts}


def read_prompts(options: ValidationOptions) -> list[Prompt]:
    """The prompts in the order of their pictures: unconditional, the built-in library, the user's, `--validation_prompt`."""
    named: dict[str, str] = dict(PROMPTS) if options.validation_prompt_library else {}
    if options.user_prompt_library is not None:
        named.update(_library(options.user_prompt_library))
    if options.validation_prompt:
        named["validation"] = options.validation_prompt
    blank = [] if options.validation_disable_unconditional else [Prompt(UNCONDITIONAL, None)]
    return blank + [Prompt(name, text) for name, text in named.items()]


def captions_to_encode(prompts: Sequence[Prompt], options: ValidationOptions, from_pictures: bool = False) -> list[str]:
    """What the pictures of some prompts need of the text encoders, and those that are made under captions of the data."""
    spoken = [prompt.text for prompt in prompts if prompt.text]
    return [*spoken, options.validation_negative_prompt] if spoken or from_pictures else []


def _library(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--user_prompt_library: {path} cannot be read: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ConfigError(f"--user_prompt_library: {path} must hold an object of names and prompts.")
    odd = [name for name in content if not name or set(name) & set('/\\:*?"<>|') or name.startswith(".")]
    if odd:
        raise ConfigError(f"--user_prompt_library: {path}: {odd[0]!r} cannot be part of a file name.")
    return content


def parse_sizes(text: str | None, trained: Size, alignment: int) -> list[Size]:
    """`--validation_resolution`: a comma list of WxH or an edge in pixels, or megapixels when there is a decimal point.

    Rounded to the network's alignment; without a setting the size that is trained.
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
    """Makes the pictures of one step: every prompt at every size, `num_validation_images` times.

    A picture begins with noise, or with a picture of the data where its prompt has a start, for families that can. Where that start has
    a condition, the picture begins with noise and follows the condition, which the file shows to the left of it. `new_sampler` makes
    diffusers' scheduler for one picture. Training is bit-identical whether pictures were made or not.
    """

    def __init__(
        self,
        options: ValidationOptions,
        family: ModelFamily,
        runtime: Runtime,
        subjects: Subjects,
        new_sampler: Callable[[], Any],
        folder: Path,
        seed: int,
    ) -> None:
        self.options = options
        self.family = family
        self.runtime = runtime
        self.subjects = subjects
        self.new_sampler = new_sampler
        self.folder = folder
        self.seed = options.validation_seed if options.validation_seed is not None else seed
        self._compiled: Any = None

    def due(self, step: int) -> bool:
        return bool(self.options.validation_steps) and step % self.options.validation_steps == 0

    def missing(self, step: int) -> bool:
        """Whether a picture of this step is not there yet; a run that was stopped meanwhile makes it when it goes on."""
        return any(not self._path(step, prompt, size, index).is_file() for prompt, size, index in self._wanted())

    def run(self, trainable: Trainable, step: int) -> list[ValidationImage]:
        """Write the pictures of a step and return them. An asked-for stop ends it after the picture at hand."""
        self.folder.mkdir(parents=True, exist_ok=True)
        images = []
        with undisturbed(*trainable.modules.values()), torch.no_grad(), self.family.image_codec(self.runtime.device) as codec:
            for prompt, size, index in self._wanted():
                if self.runtime.stop.asked:
                    break
                path = self._path(step, prompt, size, index)
                picture = codec.decode(self._latents(trainable, prompt, size, index))
                _write_picture(torch.cat([*self._shown_condition(prompt, codec), picture], dim=-1), path)
                images.append(ValidationImage(self._name(prompt, size, index), path))
        return images

    def _wanted(self) -> Iterator[tuple[Prompt, Size, int]]:
        for prompt in self.subjects.prompts:
            yield from itertools.product([prompt], self._sizes(prompt), range(self.options.num_validation_images))

    def _sizes(self, prompt: Prompt) -> Sequence[Size]:
        start = self.subjects.starts.get(prompt)
        if start is None:
            return self.subjects.sizes
        height, width = (side * self.family.latents.downsampling for side in start.latents.shape[1:])
        return [Size(width, height)]

    def _latents(self, trainable: Trainable, prompt: Prompt, size: Size, index: int) -> torch.Tensor:
        options = self.options
        pipeline = self._pipeline(trainable, self.subjects.starts.get(prompt))
        arguments = self._told(trainable, prompt, size)
        seed = secrets.randbits(32) if options.validation_randomize else self.seed + index
        with self.runtime.accelerator.autocast():  # a network alone does so by itself, one with a ControlNet is asked in two parts
            return pipeline(
                **{name: self._on_device(value) for name, value in arguments.items()},
                guidance_scale=options.validation_guidance,
                **({"guidance_rescale": options.validation_guidance_rescale} if options.validation_guidance_rescale else {}),
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images

    def _pipeline(self, trainable: Trainable, start: Start | None) -> Any:
        make = self.family.pipeline if start is None or start.condition is not None else self._img2img().img2img_pipeline
        pipeline = make(self._network(trainable), self.new_sampler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _img2img(self) -> Img2ImgFamily:
        assert can_img2img(self.family), "the settings refuse validation images that start from images for other families"
        return self.family

    def _told(self, trainable: Trainable, prompt: Prompt, size: Size) -> dict[str, Any]:
        """The pipeline's arguments for one picture: its words, and what it begins with or follows."""
        start, steps = self.subjects.starts.get(prompt), self.options.validation_num_inference_steps
        negative = self.subjects.text(self.options.validation_negative_prompt if prompt.text else None)
        text = start.text if start and start.text is not None else self.subjects.text(prompt.text)
        arguments = self.family.prompt_arguments(text, negative)
        if start and start.condition is None:
            return arguments | self._img2img().img2img_arguments(start.latents.unsqueeze(0), steps, self.subjects.strength)
        arguments |= {"width": size.width, "height": size.height, "num_inference_steps": steps}
        if start and start.condition is not None:
            condition = start.condition.unsqueeze(0).to(self.runtime.device)
            arguments[trainable.denoiser.argument] = trainable.denoiser.prepared(condition)
        return arguments

    def _shown_condition(self, prompt: Prompt, codec: ImageCodec) -> list[torch.Tensor]:
        """The condition that a picture follows as pixels (1, 3, H, W) in [-1, 1], if it does."""
        start = self.subjects.starts.get(prompt)
        if start is None or start.condition is None:
            return []
        condition = start.condition.unsqueeze(0).cpu()
        return [condition * 2 - 1 if condition.shape[-2:] != start.latents.shape[-2:] else codec.decode(condition)]

    def _on_device(self, value: object) -> object:
        return value.to(self.runtime.device, torch.float32) if isinstance(value, torch.Tensor) else value

    def _network(self, trainable: Trainable) -> Any:
        """The network as pictures are made with it: compiled once, where that is asked for; it follows the weights."""
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


def _write_picture(pixels: torch.Tensor, path: Path) -> None:
    """pixels (1, 3, H, W) in [-1, 1] => a PNG, whole or not at all."""
    array = ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    write_file(path, encoded.getvalue())
