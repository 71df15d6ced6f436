"""What data asks of its neighbors: the encoders of a model family, and a reporter. Neither imports anything of them.

Any object with these members will do. This one trains on pixels at a quarter of their size, and on the number of letters in a caption:

    class Quarter:
        fingerprint = "mean of 4 x 4 pixels"

        def encode(self, pixels):
            return {"mean": torch.nn.functional.avg_pool2d(pixels, 4)}

        def decode(self, latents):
            return torch.nn.functional.interpolate(latents, scale_factor=4)

    class Letters:
        fingerprint, limit, truncated = "letters", None, 0

        def encode(self, captions):
            return {"length": torch.tensor([[float(len(caption))] for caption in captions])}

        def token_counts(self, captions):
            return [len(caption) for caption in captions]

    class Tiny:
        latents = LatentSpec(channels=3, downsampling=4)

        def image_codec(self, device):
            return contextlib.nullcontext(Quarter())

        def text_encoders(self, device):
            return contextlib.nullcontext(Letters())

        def caption_lengths(self):
            return Letters()

        def unconditional(self, encoders):
            return {"length": torch.zeros(1)}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from helpers.data.report.survey import Survey

TextTensors = dict[str, "Tensor"]  # the output of the text encoders for one caption, by name, without a batch dimension


@dataclass(frozen=True)
class LatentSpec:
    """The shape of what a family trains on: `channels` at 1/`downsampling` of the image's width and height."""

    channels: int
    downsampling: int
    patch: int = 1  # the network reads squares of this edge, so the edges of latents are multiples of it

    @property
    def alignment(self) -> int:
        """The edges of images are multiples of this, in pixels."""
        return self.downsampling * self.patch


class ImageCodec(Protocol):
    """Converts pixels to the latents the network is trained on, and back: a VAE, or the identity for models that work on pixels."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes the bytes of `encode`: weights, dtype, scaling. Known without loading weights."""
        ...

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] => {"mean": (B, C, h, w)} and, when latents are sampled, "std"; scaled and shifted."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), as from `encode` => pixels (B, 3, H, W) in [-1, 1]."""
        ...


class TextEncoders(Protocol):
    """Converts captions to conditioning tensors. The cache and validation use the same function."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes the bytes of `encode`. Known without loading weights."""
        ...

    @property
    def truncated(self) -> int:
        """How many captions so far were longer than the encoders' limit."""
        ...

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...)."""
        ...


class CaptionLengths(Protocol):
    """Counts the tokens of captions. Needs the tokenizers only, no encoder."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes the counts."""
        ...

    @property
    def limit(self) -> int | None:
        """The most tokens the encoders read of a caption, start and end token included; None where there is no limit."""
        ...

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, start and end token included. With several tokenizers, the highest of their counts."""
        ...


class ModelEncoders(Protocol):
    """The part of a model family that data needs: what turns images and captions into the tensors that are cached."""

    @property
    def latents(self) -> LatentSpec: ...

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        """Weights are loaded by the first `encode` or `decode`, and freed when the context ends."""
        ...

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        """Weights are loaded by the first `encode`, and freed when the context ends."""
        ...

    def caption_lengths(self) -> CaptionLengths:
        """Loads no weights."""
        ...

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The text tensors that replace those of a dropped caption."""
        ...


@runtime_checkable
class EncodersApart(ModelEncoders, Protocol):
    """A family with several text encoders that can drop a caption for each of them independently (SD3)."""

    @property
    def encoders_apart(self) -> tuple[str, ...]:
        """The encoders, by their folder names, that drop captions independently; empty where a caption is dropped for all at once."""
        ...

    def without(self, text: TextTensors, encoders: Collection[str]) -> TextTensors:
        """A caption's tensors as they are when these encoders have not read it."""
        ...


@runtime_checkable
class ConditionEncoder(ModelEncoders, Protocol):
    """A family whose ControlNet reads a conditioning image beside each training image."""

    @property
    def condition_as_latents(self) -> bool:
        """True where the ControlNet reads conditions encoded by the VAE, False where it reads pixels in [0, 1]."""
        ...


def can_drop_encoders_apart(family: ModelEncoders) -> TypeGuard[EncodersApart]:
    return isinstance(family, EncodersApart)


def reads_conditions(family: ModelEncoders) -> TypeGuard[ConditionEncoder]:
    return isinstance(family, ConditionEncoder)


class DataReporter(Protocol):
    """Receives what happens while data is prepared."""

    def chapter(self, title: str, text: str) -> None:
        """One line about a part of the work, such as `dataset` or `latents`."""
        ...

    def progress(self, title: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]] | None:
        """A progress bar, or None where none is shown. The context gives a function to call with the number of units just done."""
        ...

    def surveyed(self, survey: Survey) -> None:
        """The datasets are scanned. Called again where encoding found images that cannot be used."""
        ...
