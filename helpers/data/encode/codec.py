"""One image codec for everybody who encodes in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helpers.data.base.sample import Size
from helpers.errors import is_out_of_memory

if TYPE_CHECKING:
    from helpers.data.ports import ModelEncoders


class SharedCodec:
    """The family's image codec (such as its VAE). Safe to use from several threads; they encode one after the other.

    Its weights are loaded by the first `encode` while somebody holds it, and freed when nobody does. `fingerprint` is known without them.
    """

    def __init__(self, family: ModelEncoders, device: torch.device) -> None:
        self.most_at_once: dict[Size, int] = {}  # images of a size, where more of them ran out of memory
        self._family = family
        self._device = device
        self._lock = threading.RLock()
        self._holders = 0
        self._opened = ExitStack()

    @cached_property
    def fingerprint(self) -> str:
        with self._family.image_codec(self._device) as codec:
            return codec.fingerprint

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the codec open; any number of holders at the same time."""
        with self._lock:
            if not self._holders:
                self._codec = self._opened.enter_context(self._family.image_codec(self._device))
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    del self._codec
                    self._opened.close()

    def load(self) -> None:
        """Load the weights now, in this thread: while libraries load weights, they change state of the whole process."""
        with self._lock:
            self._codec.encode(torch.zeros(1, 3, 64, 64))

    def encode(self, images: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Images (3, H, W) in [-1, 1] of one size => what `ImageCodec.encode` returns; None where memory does not suffice."""
        with self._lock:
            try:
                return self._codec.encode(torch.stack(list(images)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the exception would keep the tensors of the failed attempt alive.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            elif self._device.type == "mps":
                torch.mps.empty_cache()
            return None
