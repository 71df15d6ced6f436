"""From a micro-batch number to the tensors that the network is trained on."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from helpers.data.base.draws import StepDraws, uniform
from helpers.data.base.padding import stacked
from helpers.data.base.sample import Geometry, Sample
from helpers.data.encode.companions import CONDITION, unpacked
from helpers.data.order.epoch_order import MicroBatch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU. B samples, all of one shape; B is at least 1.

    Samples that were planned and cannot be had are not among them. Where none of a micro-batch can, one sample of zeros and weight 0
    stands in, because every process has to go through the network in every round.
    """

    latents: Tensor  # (B, C, h, w) float32
    # What the family's text encoders gave, each (B, ...), in the dtype of the cache (masks: base/padding.py). Empty where they are trained.
    text: dict[str, Tensor]
    captions: tuple[str, ...]  # trained under; "" where the caption was dropped and the text is the family's unconditional
    samples: tuple[Sample, ...]
    geometry: tuple[Geometry, ...]
    loss_weight: Tensor  # (B,) float32, of the data set
    draws: StepDraws  # the randomness of these samples in this step
    epoch: int  # from 0
    dropped: tuple[bool, ...] = ()  # which captions were
    # Of each caption the encoders that were not told of it, where each is told by itself (`EncodersApart`); empty where all are told alike.
    dropped_encoders: tuple[tuple[str, ...], ...] = ()
    stands_in: bool = False
    condition: Tensor | None = None  # (B, 3, H, W) in [0, 1], or (B, C, h, w) where the network reads latents; None where there are none

    @property
    def places(self) -> tuple[int, ...]:
        """Positions from 0 in the global step, independent of the number of processes."""
        return self.draws.places

    @property
    def global_samples(self) -> int:
        """Samples planned for the whole step, over all processes and rounds: the divisor of the loss."""
        return self.draws.step_samples

    @property
    def size(self) -> int:
        """Samples that count."""
        return 0 if self.stands_in else len(self.samples)


class TrainingRecords(Protocol):
    """Everything that is known of the rows of a plan."""

    def sample(self, row: int) -> Sample: ...

    def geometry(self, row: int, epoch: int) -> Geometry: ...

    def loss_weight(self, row: int) -> float: ...

    def latents(self, row: int, epoch: int) -> dict[str, Tensor] | None:
        """What the image codec gave for the row, without a batch dimension: "mean", and "std" where latents are sampled.

        Beside them "condition", as it is kept, where the images have one. None where the image turned out to be one that cannot be encoded.
        """
        ...

    def blank_latents(self, row: int, epoch: int) -> dict[str, Tensor]:
        """Zeros of the shape that the row's latents have."""
        ...

    def text(self, row: int, draw: CaptionDraw) -> Mapping[str, Tensor]:
        """What the text encoders gave for a caption of the row, without a batch dimension."""
        ...


@dataclass(frozen=True)
class CaptionDraw:
    """What the network is told by words in one appearance of a sample."""

    caption: str | None  # None where it was dropped, and the family's unconditional stands for it
    without: tuple[str, ...] = ()  # the text encoders that were not told of it; all of them where it was dropped


class BatchMaker:
    """Makes batches of micro-batches; the choice and the dropping of captions are drawn by address."""

    def __init__(self, records: TrainingRecords, seed: int, caption_dropout: float = 0.0, encoders_apart: Sequence[str] = ()) -> None:
        """`encoders_apart` are the text encoders that a caption is kept from each by itself; none where it is dropped as a whole."""
        self.records = records
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.encoders_apart = encoders_apart

    def keeping_captions(self) -> BatchMaker:
        """The same, with the captions that it would drop."""
        return BatchMaker(self.records, self.seed, 0.0, self.encoders_apart)

    def make(self, micro: MicroBatch, step: int) -> Batch:
        """The batch of a micro-batch of step `step`, counted from 0."""
        latents = [self.records.latents(int(row), micro.epoch) for row in micro.samples]
        there = [i for i, record in enumerate(latents) if record is not None]
        if not there:
            return self._stand_in(micro, step)
        samples = tuple(self.records.sample(int(micro.samples[i])) for i in there)
        told = [self._told(sample, micro.epoch, int(micro.repeats[i])) for i, sample in zip(there, samples, strict=True)]
        return self._batch(micro, step, there, [record for record in latents if record is not None], samples, told)

    def _stand_in(self, micro: MicroBatch, step: int) -> Batch:
        row = int(micro.samples[0])
        latents = self.records.blank_latents(row, micro.epoch)
        batch = self._batch(micro, step, [0], [latents], (self.records.sample(row),), [CaptionDraw(None, tuple(self.encoders_apart))])
        return dataclasses.replace(batch, loss_weight=torch.zeros(1), stands_in=True)

    def _batch(
        self,
        micro: MicroBatch,
        step: int,
        there: Sequence[int],
        latents: Sequence[Mapping[str, Tensor]],
        samples: tuple[Sample, ...],
        told: Sequence[CaptionDraw],
    ) -> Batch:
        rows = [int(micro.samples[i]) for i in there]
        draws = StepDraws(self.seed, step, tuple(micro.places[i] for i in there), micro.step_samples)
        return Batch(
            latents=_latents(latents, draws),
            text=stacked([self.records.text(row, words) for row, words in zip(rows, told, strict=True)]),
            captions=tuple(words.caption or "" for words in told),
            samples=samples,
            geometry=tuple(self.records.geometry(row, micro.epoch) for row in rows),
            loss_weight=torch.tensor([self.records.loss_weight(row) for row in rows], dtype=torch.float32),
            draws=draws,
            epoch=micro.epoch,
            dropped=tuple(words.caption is None for words in told),
            dropped_encoders=tuple(words.without for words in told) if self.encoders_apart else (),
            condition=_condition(latents),
        )

    def _told(self, sample: Sample, epoch: int, repeat: int) -> CaptionDraw:
        """The caption for one appearance of a sample, and who is not told of it.

        Each of n encoders is left out at the nth root of the rate, so that all of them are at the rate itself.
        """
        address = (self.seed, epoch, sample.dataset, sample.key, repeat)
        encoders = self.encoders_apart or ("all",)
        rate = self.caption_dropout ** (1 / len(encoders))
        without = tuple(name for name in encoders if uniform("caption_dropout", *address, name) < rate)
        if len(without) == len(encoders):
            return CaptionDraw(None, without)
        return CaptionDraw(sample.captions[int(uniform("caption", *address) * len(sample.captions))], without)


def _latents(records: Sequence[Mapping[str, Tensor]], draws: StepDraws) -> Tensor:
    """(B, C, h, w) float32: the means, or a draw from the posterior where the codec kept its width."""
    latents = stacked([{name: record[name] for name in record if name != CONDITION} for record in records])
    mean = latents["mean"].float()
    if "std" not in latents:
        return mean
    return mean + latents["std"].float() * draws.normal("posterior", *mean.shape[1:])


def _condition(records: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    if CONDITION not in records[0]:
        return None
    return torch.stack([unpacked(record[CONDITION]) for record in records])


def prefetched(produce: Callable[[], Iterator[Item]], ahead: int) -> Generator[Item, None, None]:
    """The items of `produce()`, made in a background thread that stays at most `ahead` items in front of the reader.

    An error in the thread is raised here, in its place among the items. Closing the iterator, as leaving a `for` loop does,
    ends the thread.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=max(ahead, 1))
    closed = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue  # look again whether the reader has left

    def work() -> None:
        try:
            for item in produce():
                if closed.is_set():
                    return
                put(item, None)
            put(None, StopIteration())
        except BaseException as error:  # raised again in the reader's thread
            put(None, error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item that comes without an error is one of `produce`
    finally:
        closed.set()
        thread.join()
