"""One image codec for everybody who encodes in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from helpers.data.ports import ImageCodec, ModelEncoders


class SharedCodec:
    """The family's image codec (such as its VAE). Safe to use from several threads; they encode one after the other.

    It is opened by the first `hold`, loads its weights when it first encodes, and is closed by the last `release`. `fingerprint` is known
    without loading weights.
    """

    def __init__(self, family: ModelEncoders, device: torch.device) -> None:
        self._family = family
        self._device = device
        self._lock = threading.RLock()
        self._holders = 0
        self._opened: AbstractContextManager[ImageCodec] | None = None
        self._most_at_once: dict[torch.Size, int] = {}  # images of a shape, since more of them ran out of memory

    @cached_property
    def fingerprint(self) -> str:
        with self._family.image_codec(self._device) as codec:
            return codec.fingerprint

    def hold(self) -> None:
        """Keep the codec open until `release`."""
        with self._lock:
            if self._opened is None:
                self._opened = self._family.image_codec(self._device)
                self._codec = self._opened.__enter__()
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._opened is not None and not self._holders:
                del self._codec
                self._opened.__exit__(None, None, None)
                self._opened = None

    @contextmanager
    def held(self) -> Iterator[None]:
        self.hold()
        try:
            yield
        finally:
            self.release()

    def load(self) -> None:
        """Load the weights now, in this thread: while libraries load weights, they change state of the whole process."""
        with self._lock:
            self._codec.encode(torch.zeros(1, 3, 64, 64))

    def encode(self, images: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Images (3, H, W) in [-1, 1] of one size => what `ImageCodec.encode` returns; None where memory does not suffice."""
        with self._lock:
            try:
                return self._codec.encode(torch.stack(list(images)))
            except torch.OutOfMemoryError:
                pass  # outside the handler, or the exception would keep the tensors of the failed attempt alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None

    def batch_limit(self, image: Tensor) -> int | None:
        """The most images of this size to encode at once; None where no limit is known."""
        return self._most_at_once.get(image.shape)

    def limit_batches(self, image: Tensor, limit: int) -> None:
        self._most_at_once[image.shape] = limit
