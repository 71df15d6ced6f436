"""What training asks of the data: batches by step number, text tensors for validation, a fingerprint."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helpers.data.base.prefetch import made_in_threads
from helpers.data.base.sample import Geometry, Sample, Size
from helpers.data.batches import Batch, BatchMaker, CaptionDraw, prefetched
from helpers.data.encode.encoder import LatentEncoder
from helpers.data.encode.texts import TextStore
from helpers.data.fingerprint import DataFingerprint
from helpers.data.order.epoch_order import FROM_THE_BEGINNING, MicroBatch, OrderStart
from helpers.data.order.steps import Steps
from helpers.data.planned import PlannedData
from helpers.data.ports import can_drop_encoders_apart
from helpers.data.surveying import Surveyor

if TYPE_CHECKING:
    from helpers.data.ports import ModelEncoders, TextTensors

STEPS_AHEAD = 2  # steps whose batches are made before they are asked for
MICRO_BATCHES_AT_ONCE = 16  # made at the same time where caches are read from a network; so many more are in memory


class CachedRecords:
    """The rows of the plan with what is cached of them: the `TrainingRecords` that `BatchMaker` reads."""

    def __init__(self, data: PlannedData, family: ModelEncoders, encoder: LatentEncoder, texts: TextStore) -> None:
        self.data = data
        self.encoder = encoder
        self.texts = texts
        self._family = family

    @property
    def are_remote(self) -> bool:
        """Whether any of the caches is read from a network."""
        return self.encoder.store.is_remote or self.texts.is_remote

    def sample(self, row: int) -> Sample:
        return self.data.sample(row)

    def geometry(self, row: int, epoch: int) -> Geometry:
        return self.encoder.store.holder(row, epoch).plan.geometry(row)

    def loss_weight(self, row: int) -> float:
        return self.data.datasets[self.data.dataset_of(row)].loss_weight

    def mask_outside_weight(self, row: int) -> float:
        return self.data.datasets[self.data.dataset_of(row)].mask_outside_weight

    def latents(self, row: int, epoch: int) -> dict[str, Tensor] | None:
        return self.encoder.read(row, epoch)

    def blank_latents(self, row: int, epoch: int) -> dict[str, Tensor]:
        spec, geometry = self._family.latents, self.geometry(row, epoch)
        blank = torch.zeros(spec.channels, geometry.target.height // spec.downsampling, geometry.target.width // spec.downsampling)
        companions = self.data.companions[self.data.dataset_of(row)]
        return {"mean": blank, **{companion.role: companion.blank(blank, geometry) for companion in companions}}

    def text(self, row: int, draw: CaptionDraw) -> Mapping[str, Tensor]:
        if draw.caption is None:
            return self.texts.unconditional
        if not self.texts.is_cached:
            return {}
        text = self.texts.read(draw.caption, self.data.dataset_of(row))
        if not draw.without:
            return text
        assert can_drop_encoders_apart(self._family), "only such a family names encoders to drop"
        return self._family.without(text, draw.without)


class TrainingData:
    """Everything training asks of the data. Steps and epochs are counted from 0.

    `undecodable` lists by dataset the images that were left out as such when the run began. Checkpoints hold it, so that a resumed run
    has the same plan.
    """

    def __init__(
        self,
        records: CachedRecords,
        steps: Steps,
        maker: BatchMaker,
        fingerprint: DataFingerprint,
        undecodable: Mapping[str, Sequence[str]],
        surveyor: Surveyor,
    ) -> None:
        self.undecodable = undecodable
        self._data = records.data
        self._records = records
        self._encoder = records.encoder
        self._steps = steps
        self._maker = maker
        self._fingerprint = fingerprint
        self._surveyor = surveyor

    # -- batches ----------------------------------------------------------------------------------------------------------

    def steps(
        self, start: int, end: int, order: OrderStart = FROM_THE_BEGINNING, keep_captions: bool = False
    ) -> Generator[list[Batch], None, None]:
        """For each step from `start` up to but without `end`, this process's batches, one for each accumulation step.

        `order` says where the order of this data begins, not after `start`. `keep_captions` drops no caption, for those who show the data.
        A thread makes batches ahead and another encodes missing latents; both end when the iterator is closed or used up.
        """
        maker = self._maker.keeping_captions() if keep_captions else self._maker

        def make(of_step: tuple[MicroBatch, int]) -> Batch:
            return maker.make(*of_step)

        def produce() -> Iterator[list[Batch]]:
            # Reading from a network is mostly waiting, so many are made at once. From a disk one thread is enough.
            pairs = ((micro, step) for step in range(start, end) for micro in self._steps.here(step, order))
            batches = made_in_threads(make, pairs, MICRO_BATCHES_AT_ONCE) if self._records.are_remote else map(make, pairs)
            for _ in range(start, end):
                yield [next(batches) for _ in range(self._steps.accumulation)]

        self._encoder.start(start, order, end)
        batches = prefetched(produce, STEPS_AHEAD)
        try:
            yield from self._followed(batches)
        finally:
            self.close()  # first: the thread that makes batches may be waiting for latents
            batches.close()

    def _followed(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Pass steps on. Give up the latents of single epochs that are over, and remove them one step later.

        Asking for a step means that this process has finished the one before, and so that every process has asked for that one.
        """
        epochs: deque[int] = deque(maxlen=2)  # that this process's last two steps began in
        is_reported = False
        for step in batches:
            self._encoder.check()
            if self._encoder.has_finished and not is_reported:
                self._surveyor.update()
                is_reported = True
            if len(epochs) == 2:
                self._encoder.store.remove_before(epochs[0])
            if epochs:
                self._encoder.close_before(epochs[-1])
            epochs.append(step[0].epoch)
            yield step

    def close(self) -> None:
        """Stop encoding. What has been encoded is kept."""
        self._encoder.close()
        self._surveyor.update()

    # -- numbers ----------------------------------------------------------------------------------------------------------

    @property
    def micro_batches_per_epoch(self) -> int:
        """Of the first epoch, over all processes; see `EpochOrder`."""
        return self._steps.order.micro_batches_per_epoch

    def micro_batches(self, first_epoch: int, end_epoch: int) -> int:
        """Of the epochs from `first_epoch` up to but without `end_epoch`, over all processes."""
        return self._steps.order.micro_batches(first_epoch, end_epoch)

    @property
    def samples_per_epoch(self) -> int:
        """Includes images that turn out not to be encodable."""
        return self._steps.order.samples_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Not always whole: a step may begin in one epoch and end in the next."""
        return self.micro_batches_per_epoch / self._steps.micro_batches

    def untouched_epoch(self, steps: int, order: OrderStart = FROM_THE_BEGINNING) -> int:
        """The first epoch of which nothing was trained in the first `steps` steps."""
        return self._steps.order.untouched_epoch(steps, self._steps.micro_batches, order)

    @property
    def samples_of_datasets(self) -> dict[str, int]:
        """The number of images of each dataset, by its id."""
        plan = self._data.plan
        counts = np.bincount(plan.columns["dataset"], minlength=len(plan.datasets))
        return dict(zip(plan.datasets, counts.tolist(), strict=True))

    @property
    def most_common_shape(self) -> Size:
        """The size that most images are trained at, without those of regularization datasets; of equally common sizes the first."""
        columns = self._data.plan.columns
        counted = np.array([not dataset.is_regularisation_data for dataset in self._data.datasets])[columns["dataset"]]
        return self._data.plan.shapes[int(np.bincount(columns["shape"][counted]).argmax())]

    def describe(self) -> str:
        """One line: samples, sizes, micro-batches of an epoch."""
        shapes = len(self._data.plan.shapes)
        return (
            f"{self.samples_per_epoch:,} samples an epoch in {shapes:,} size{'s' if shapes != 1 else ''}"
            f" · {self.micro_batches_per_epoch:,} micro-batches · {self.steps_per_epoch:,.1f} steps"
        )

    # -- checkpoints and validation -----------------------------------------------------------------------------------------

    def fingerprint(self, like: Mapping[str, str] | None = None) -> dict[str, str]:
        """What must stay the same for a resumed run to be exact: values by name, for checkpoints.

        `like` is the fingerprint in a checkpoint; the result is then the one to compare it with.
        """
        return self._fingerprint.compute(like)

    def remember_undecodable(self) -> None:
        """Make later runs leave out what this one could not decode.

        Call it after a checkpoint with this run's plan was saved: a run that is killed before must find the same plan when it restarts.
        """
        self._data.catalogue.leave_out_undecodable()

    def text(self, caption: str) -> TextTensors:
        """The text tensors of "" or one of the extra captions, without a batch dimension, in the cache's precision."""
        if not self._records.texts.is_cached:
            raise ValueError("The text encoders are trained: no caption is cached.")
        return self._records.texts.read(caption)

    @property
    def unconditional(self) -> TextTensors:
        """What a dropped caption becomes."""
        return dict(self._records.texts.unconditional)
