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
from helpers.data.base.sample import CONDITION, MASK, ROLES, Geometry, Sample
from helpers.data.encode.companions import unpacked
from helpers.data.order.epoch_order import MicroBatch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU. B samples, all of one shape; B is at least 1.

    Images that could not be encoded are left out. If that is all of a micro-batch, it holds one sample of zeros with weight 0 instead,
    because every process has to run the network in every accumulation step.
    """

    latents: Tensor  # (B, C, h, w) float32
    # The text encoders' output, each (B, ...), in the dtype of the cache (masks: base/padding.py). Empty where the encoders are trained.
    text: dict[str, Tensor]
    captions: tuple[str, ...]  # "" where the caption was dropped and the text is the family's unconditional
    samples: tuple[Sample, ...]
    geometry: tuple[Geometry, ...]
    loss_weight: Tensor  # (B,) float32, of the dataset
    draws: StepDraws  # the randomness of these samples in this step
    epoch: int  # from 0
    dropped: tuple[bool, ...] = ()  # which captions were
    # For each caption the text encoders that dropped it, where they drop captions independently (`EncodersApart`); else empty.
    dropped_encoders: tuple[tuple[str, ...], ...] = ()
    stands_in: bool = False
    condition: Tensor | None = None  # (B, 3, H, W) in [0, 1], or (B, C, h, w) where the network reads latents; None where there are none
    mask: Tensor | None = None  # (B, 1, h, w) float32, the loss weight of each pixel of the latents; None where no sample has a mask

    @property
    def places(self) -> tuple[int, ...]:
        """Positions from 0 in the global step, independent of the number of processes."""
        return self.draws.places

    @property
    def global_samples(self) -> int:
        """Samples planned for the whole step, over all processes and accumulation steps: the divisor of the loss."""
        return self.draws.step_samples

    @property
    def size(self) -> int:
        """Samples, without the one that stands in."""
        return 0 if self.stands_in else len(self.samples)


class TrainingRecords(Protocol):
    """What `BatchMaker` reads about the rows of a plan."""

    def sample(self, row: int) -> Sample: ...

    def geometry(self, row: int, epoch: int) -> Geometry: ...

    def loss_weight(self, row: int) -> float: ...

    def mask_outside_weight(self, row: int) -> float:
        """The loss weight of what a mask leaves black, from 0 to 1."""
        ...

    def latents(self, row: int, epoch: int) -> dict[str, Tensor] | None:
        """The record of a row, without a batch dimension: "mean", "std" where latents are sampled, "condition" and "mask" if it has any.

        None if the image cannot be encoded.
        """
        ...

    def blank_latents(self, row: int, epoch: int) -> dict[str, Tensor]:
        """A record of zeros, of the shapes that the row's record has."""
        ...

    def text(self, row: int, draw: CaptionDraw) -> Mapping[str, Tensor]:
        """The text tensors of a caption of the row, without a batch dimension."""
        ...


@dataclass(frozen=True)
class CaptionDraw:
    """The caption of one appearance of a sample."""

    caption: str | None  # None if it was dropped: then the family's unconditional takes its place
    without: tuple[str, ...] = ()  # the text encoders that dropped it; all of them if it was dropped


class BatchMaker:
    """Makes the batch of a micro-batch. Captions are chosen and dropped by addressed draws."""

    def __init__(self, records: TrainingRecords, seed: int, caption_dropout: float = 0.0, encoders_apart: Sequence[str] = ()) -> None:
        """`encoders_apart` are the text encoders that drop captions independently; empty where a caption is dropped for all at once."""
        self.records = records
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.encoders_apart = encoders_apart

    def keeping_captions(self) -> BatchMaker:
        """The same without caption dropout."""
        return BatchMaker(self.records, self.seed, 0.0, self.encoders_apart)

    def make(self, micro: MicroBatch, step: int) -> Batch:
        """The batch of a micro-batch of step `step`, counted from 0."""
        latents = [self.records.latents(int(row), micro.epoch) for row in micro.samples]
        there = [i for i, record in enumerate(latents) if record is not None]
        if not there:
            return self._stand_in(micro, step)
        samples = tuple(self.records.sample(int(micro.samples[i])) for i in there)
        draws = [self._draw_caption(sample, micro.epoch, int(micro.repeats[i])) for i, sample in zip(there, samples, strict=True)]
        return self._batch(micro, step, there, [record for record in latents if record is not None], samples, draws)

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
        captions: Sequence[CaptionDraw],
    ) -> Batch:
        rows = [int(micro.samples[i]) for i in there]
        draws = StepDraws(self.seed, step, tuple(micro.places[i] for i in there), micro.step_samples)
        return Batch(
            latents=_latents(latents, draws),
            text=stacked([self.records.text(row, draw) for row, draw in zip(rows, captions, strict=True)]),
            captions=tuple(draw.caption or "" for draw in captions),
            samples=samples,
            geometry=tuple(self.records.geometry(row, micro.epoch) for row in rows),
            loss_weight=torch.tensor([self.records.loss_weight(row) for row in rows], dtype=torch.float32),
            draws=draws,
            epoch=micro.epoch,
            dropped=tuple(draw.caption is None for draw in captions),
            dropped_encoders=tuple(draw.without for draw in captions) if self.encoders_apart else (),
            condition=_condition(latents),
            mask=_mask(latents, [self.records.mask_outside_weight(row) for row in rows]),
        )

    def _draw_caption(self, sample: Sample, epoch: int, repeat: int) -> CaptionDraw:
        """The caption for one appearance of a sample, and which encoders drop it.

        Each of n encoders drops it at the nth root of the rate, so that all of them drop it together at the rate itself.
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
    latents = stacked([{name: record[name] for name in record if name not in ROLES} for record in records])
    mean = latents["mean"].float()
    if "std" not in latents:
        return mean
    return mean + latents["std"].float() * draws.normal("posterior", *mean.shape[1:])


def _condition(records: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    if CONDITION not in records[0]:
        return None
    return torch.stack([unpacked(record[CONDITION]) for record in records])


def _mask(records: Sequence[Mapping[str, Tensor]], outside: Sequence[float]) -> Tensor | None:
    """(B, 1, h, w) float32: o + (1 - o) m for each mask m and the weight o of what it leaves black; ones where an image has no mask."""
    if not any(MASK in record for record in records):
        return None
    whole = torch.ones_like(records[0]["mean"][:1], dtype=torch.float32)
    weights = [record[MASK].float() if MASK in record else whole for record in records]
    return torch.stack([least + (1 - least) * weight for weight, least in zip(weights, outside, strict=True)])


def prefetched(produce: Callable[[], Iterator[Item]], ahead: int) -> Generator[Item, None, None]:
    """The items of `produce()`, made in a background thread that stays at most `ahead` items in front of the reader.

    An error in the thread is raised here, in its place among the items. Closing the iterator ends the thread.
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
