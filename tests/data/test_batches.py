"""A micro-batch becomes tensors: captions by address, latents in float32, made ahead without surprises."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.data.base.sample import Geometry, Sample, Size
from helpers.data.batches import BatchMaker, CaptionDraw, prefetched
from helpers.data.order.epoch_order import MicroBatch


class Rows:
    """Records in memory: row i has latents of all i, and its captions are numbered."""

    def __init__(
        self, captions: int = 1, std: float | None = None, lost: Collection[int] = (), masks: Mapping[int, Tensor] = MappingProxyType({})
    ) -> None:
        self.captions = captions
        self.std = std
        self.lost = lost
        self.masks = masks

    def sample(self, row: int) -> Sample:
        return Sample("toys", f"{row}.png", Size(64, 64), tuple(f"{row}/{number}" for number in range(self.captions)))

    def geometry(self, row: int, epoch: int) -> Geometry:
        return Geometry(Size(64, 64), Size(64, 64), 0, 0, Size(64, 64))

    def loss_weight(self, row: int) -> float:
        return 1.0 + row

    def mask_outside_weight(self, row: int) -> float:
        return 0.25 * (row % 2)

    def latents(self, row: int, epoch: int) -> dict[str, Tensor] | None:
        if row in self.lost:
            return None
        mean = torch.full((4, 8, 8), row, dtype=torch.float16)
        record = {"mean": mean} if self.std is None else {"mean": mean, "std": torch.full_like(mean, self.std)}
        return {**record, "mask": self.masks[row].half()} if row in self.masks else record

    def blank_latents(self, row: int, epoch: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(4, 8, 8)}

    def text(self, row: int, draw: CaptionDraw) -> Mapping[str, Tensor]:
        return {"pooled": torch.full((8,), -1.0 if draw.caption is None else row, dtype=torch.bfloat16)}


def micro(*rows: int, epoch: int = 0, repeat: int = 0, first_place: int = 0, step_samples: int = 8) -> MicroBatch:
    places = tuple(range(first_place, first_place + len(rows)))
    return MicroBatch(epoch, np.array(rows), np.full(len(rows), repeat), places, step_samples)


def test_a_batch_holds_what_belongs_to_its_rows_in_their_order() -> None:
    batch = BatchMaker(Rows(), seed=1).make(micro(5, 3, first_place=4, epoch=2), step=9)
    assert batch.latents.dtype == torch.float32 and batch.latents.shape == (2, 4, 8, 8)
    assert batch.latents[:, 0, 0, 0].tolist() == [5, 3]
    assert batch.text["pooled"][:, 0].tolist() == [5, 3] and batch.text["pooled"].dtype == torch.bfloat16
    assert batch.captions == ("5/0", "3/0") and [sample.key for sample in batch.samples] == ["5.png", "3.png"]
    assert batch.loss_weight.tolist() == [6, 4]
    assert (batch.places, batch.global_samples, batch.epoch, batch.draws.step) == ((4, 5), 8, 2, 9)


def test_masks_become_loss_weights_and_an_image_without_one_counts_whole_beside_them() -> None:
    half = torch.zeros(1, 8, 8)
    half[:, 4:], half[:, 0] = 1, 0.5
    batch = BatchMaker(Rows(masks={4: half, 5: half}, std=0.5), seed=1).make(micro(4, 5, 6), step=9)
    assert batch.mask is not None and batch.mask.dtype == torch.float32
    assert torch.equal(batch.mask, torch.stack([half, 0.25 + 0.75 * half, torch.ones(1, 8, 8)]))
    plain = BatchMaker(Rows(std=0.5), seed=1).make(micro(4, 5, 6), step=9)
    assert plain.mask is None and torch.equal(batch.latents, plain.latents)


def test_what_cannot_be_had_leaves_its_place_empty_and_changes_nothing_for_the_others() -> None:
    whole = BatchMaker(Rows(captions=4, std=0.5), seed=1, caption_dropout=0.3).make(micro(5, 3, 8, first_place=4), step=9)
    batch = BatchMaker(Rows(captions=4, std=0.5, lost={3}), seed=1, caption_dropout=0.3).make(micro(5, 3, 8, first_place=4), step=9)
    assert (batch.places, batch.size, batch.global_samples) == ((4, 6), 2, 8)
    assert batch.captions == (whole.captions[0], whole.captions[2])
    assert torch.equal(batch.latents, whole.latents[[0, 2]]) and torch.equal(batch.draws.normal("x", 2), whole.draws.normal("x", 2)[[0, 2]])


def test_where_nothing_can_be_had_a_stand_in_of_no_weight_keeps_the_round_going() -> None:
    batch = BatchMaker(Rows(lost={5, 3}), seed=1).make(micro(5, 3, first_place=4), step=9)
    assert batch.stands_in and batch.size == 0 and batch.loss_weight.tolist() == [0]
    assert not batch.latents.any() and batch.text["pooled"][0, 0] == -1 and batch.places == (4,)


def test_captions_are_dropped_at_their_rate_and_become_the_unconditional() -> None:
    maker = BatchMaker(Rows(), seed=1, caption_dropout=0.1)
    batch = maker.make(micro(*range(2000), step_samples=2000), step=0)
    dropped = torch.tensor([caption == "" for caption in batch.captions])
    assert abs(dropped.float().mean() - 0.1) < 3 * (0.1 * 0.9 / 2000) ** 0.5
    assert (batch.text["pooled"][dropped] == -1).all() and (batch.text["pooled"][~dropped] != -1).all()


def test_who_only_looks_at_the_data_is_told_the_captions_that_are_dropped() -> None:
    maker = BatchMaker(Rows(captions=4), seed=1, caption_dropout=0.5, encoders_apart=("one", "two"))
    rows = micro(*range(50))
    trained, shown = maker.make(rows, step=0), maker.keeping_captions().make(rows, step=0)
    assert not any(shown.dropped) and not any(shown.dropped_encoders) and any(trained.dropped)
    assert all(caption in ("", told) for caption, told in zip(trained.captions, shown.captions, strict=True))
    assert (shown.text["pooled"] != -1).all() and torch.equal(shown.latents, trained.latents)


def test_encoders_that_are_told_apart_are_dropped_at_the_root_of_the_rate_each_by_itself() -> None:
    """Three at 46.4 % each, as in the training of Stable Diffusion 3: all of them in a tenth of the samples."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    batch = BatchMaker(Rows(), seed=1, caption_dropout=0.1, encoders_apart=names).make(micro(*range(4000), step_samples=4000), step=0)
    dropped = torch.tensor([[name in without for name in names] for without in batch.dropped_encoders], dtype=torch.float64)

    def is_rate(found: Tensor, rate: float) -> bool:
        return abs(found.item() - rate) < 3 * (rate * (1 - rate) / 4000) ** 0.5

    assert all(is_rate(one, 0.4642) for one in dropped.mean(dim=0))
    assert all(is_rate((dropped[:, i] * dropped[:, j]).mean(), 0.4642**2) for i, j in ((0, 1), (0, 2), (1, 2)))
    whole = dropped.bool().all(dim=1)
    assert is_rate(whole.double().mean(), 0.1) and batch.dropped == tuple(whole.tolist())
    assert (batch.text["pooled"][whole] == -1).all() and (batch.text["pooled"][~whole] != -1).all()


def test_which_encoders_are_told_depends_on_epoch_and_repeat_alone() -> None:
    maker = BatchMaker(Rows(), seed=1, caption_dropout=0.3, encoders_apart=("one", "two"))
    rows = tuple(range(50))
    first = maker.make(micro(*rows), step=0).dropped_encoders
    assert first == tuple(maker.make(micro(row, first_place=3), step=7).dropped_encoders[0] for row in rows)
    assert (
        first != maker.make(micro(*rows, epoch=1), step=0).dropped_encoders != maker.make(micro(*rows, repeat=1), step=0).dropped_encoders
    )


def test_captions_depend_on_epoch_and_repeat_but_not_on_step_place_or_batch_mates() -> None:
    maker = BatchMaker(Rows(captions=4), seed=1, caption_dropout=0.3)
    rows = tuple(range(50))
    first = maker.make(micro(*rows), step=0).captions
    alone = tuple(maker.make(micro(row, first_place=3), step=7).captions[0] for row in rows)
    assert first == alone
    assert first != maker.make(micro(*rows, epoch=1), step=0).captions
    assert first != maker.make(micro(*rows, repeat=1), step=0).captions
    assert {caption[-1] for caption in first if caption} == set("0123")


def test_latents_are_drawn_from_the_posterior_by_step_and_place_where_its_width_is_kept() -> None:
    maker = BatchMaker(Rows(std=0.5), seed=1)
    one = maker.make(micro(3, 3, 3, 3), step=0).latents
    assert one.std() == pytest.approx(0.5, rel=0.1) and one.mean() == pytest.approx(3, abs=0.1)
    assert torch.equal(one[2], maker.make(micro(3, first_place=2), step=0).latents[0])
    assert not torch.equal(one, maker.make(micro(3, 3, 3, 3), step=1).latents)


def threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_items_are_made_ahead_up_to_a_bound_and_arrive_in_order() -> None:
    made: list[int] = []

    def produce() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    items = prefetched(produce, ahead=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, two waiting, one in hand
    assert list(items) == list(range(1, 10)) and threads() == 0


def test_an_error_in_the_thread_is_raised_in_its_place() -> None:
    def produce() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    items = prefetched(produce, ahead=3)
    assert next(items) == 1
    with pytest.raises(KeyError, match="lost"):
        next(items)
    assert threads() == 0


def test_leaving_early_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield (number := number + 1)

    items = prefetched(endless, ahead=2)
    assert next(items) == 1
    items.close()  # type: ignore[attr-defined]
    assert threads() == 0
