"""The latents of every epoch: by which plan they are cut, and where they lie as far as that is known.

The cuts of most data sets stay as they are: one pass serves every epoch. Those of data sets that are redrawn have a pass for each
epoch, in a folder of its own, which goes when its epoch is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.data.cache.index import LOCATION, Locations
from helpers.data.encode.latents import EVERY_EPOCH, LatentEncoder, Unit
from helpers.data.order.epoch_order import MicroBatch
from helpers.data.plan.buckets import BucketPlan

if TYPE_CHECKING:
    from helpers.data.ports import ImageCodec, ModelEncoders


class HeldCodec:
    """A family's image codec, open between `open` and `close` and loaded by its first use. Its fingerprint is always known."""

    def __init__(self, family: ModelEncoders, device: torch.device) -> None:
        self._context: Callable[[], AbstractContextManager[ImageCodec]] = lambda: family.image_codec(device)
        self._opened: AbstractContextManager[ImageCodec] | None = None
        with self._context() as codec:
            self.fingerprint = codec.fingerprint

    def open(self) -> None:
        if self._opened is None:
            self._opened = self._context()
            self._codec = self._opened.__enter__()

    def warm_up(self) -> None:
        """Load the weights now, in this thread: while libraries load them, they change what belongs to the whole process."""
        self.encode(torch.zeros(1, 3, 64, 64))

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        return self._codec.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self._codec.decode(latents)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
            self._opened = None
            del self._codec


class Pass:
    """What is encoded for one epoch, or, with the number EVERY_EPOCH, for all of them.

    `locations` (N,) are those of the rows of the plan that belong to the pass; "shard" is 0 where nothing is known yet. `hopeless` (N,)
    marks rows that are known not to be had.
    """

    def __init__(self, number: int, plan: BucketPlan, fillers: dict[int, LatentEncoder], batch_size: int, cache_dtype: str) -> None:
        self.number = number
        self.plan = plan
        self.fillers = fillers  # by data set
        self.locations: Locations = np.zeros(len(plan), dtype=LOCATION)
        self.hopeless = np.zeros(len(plan), dtype=bool)
        self._batch_size = batch_size
        self._cache_dtype = cache_dtype

    @cached_property
    def _units(self) -> list[Unit]:
        """Made when one is asked for: where everything is cached nobody asks, and there may be many."""
        return [(filler, rows) for filler in self.fillers.values() for rows in filler.batches(self._batch_size)]

    @cached_property
    def _unit_of(self) -> NDArray[np.int32]:
        """(N,) the number of each row's unit, -1 for rows of other passes."""
        numbers = np.full(len(self.plan), -1, np.int32)
        for number, (_, rows) in enumerate(self._units):
            numbers[rows] = number
        return numbers

    @cached_property
    def _taken(self) -> NDArray[np.bool_]:
        return np.zeros(len(self._units), dtype=bool)

    def locate(self, known: Locations | None = None) -> None:
        """Look up all rows; `known` is the answer where it is remembered."""
        if known is not None:
            self.locations = known
            return
        for filler in self.fillers.values():
            self.locations[filler.rows] = filler.locate(self._cache_dtype)
            failed = list(filler.catalogue.failed(self.number))
            self.hopeless[filler.rows] = np.isin(self.plan.columns["row"][filler.rows], failed) & ~self.there(filler.rows)

    def there(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows are cached, as far as is known."""
        return self.locations["shard"][rows] != 0

    def locate_row(self, row: int) -> np.void:
        """Look up a row that was not there before."""
        location = self.fillers[int(self.plan.columns["dataset"][row])].locate_row(row, self._cache_dtype)
        if location["shard"]:
            self.locations[row] = location
        return location

    def lacks(self, rows: NDArray[np.int64]) -> bool:
        """Whether latents of some of these rows are still to be encoded, as far as is known."""
        return not (self.there(rows) | self.hopeless[rows]).all()

    @property
    def incomplete(self) -> bool:
        return any(self.lacks(filler.rows) for filler in self.fillers.values())

    def unit_of(self, row: int) -> int:
        """The number of a row's unit; -1 where the row is of another pass."""
        return int(self._unit_of[row])

    # -- who takes which unit ---------------------------------------------------------------------------------------------

    def take(self, row: int) -> Unit | None:
        """The unit of a row when it is asked for the first time, else None."""
        number = self.unit_of(row)
        if self._taken[number]:
            return None
        self._taken[number] = True
        return self._units[number]

    def take_rest(self) -> Iterator[Unit]:
        """The units that nobody took, in plan order."""
        for number in np.flatnonzero(~self._taken):
            self._taken[number] = True
            yield self._units[number]

    def put_back(self) -> None:
        self._taken[:] = False

    @property
    def all_taken(self) -> bool:
        return bool(self._taken.all())


class Passes:
    """The passes by data set and epoch. Safe to use from several threads.

    `redrawn` tells for each data set whether it has a pass for each epoch. `plan_of` gives the plan of an epoch, whose rows are those
    of `plan` in the same order; `fillers_of` the fillers of some data sets for a plan and a pass's number; `known` where the latents of a
    pass lie, if an earlier start has looked that up.
    """

    def __init__(
        self,
        plan: BucketPlan,
        redrawn: Sequence[bool],
        plan_of: Callable[[int], BucketPlan],
        fillers_of: Callable[[BucketPlan, list[int], int], dict[int, LatentEncoder]],
        batch_size: int,
        cache_dtype: str,
        known: Callable[[Pass], Locations | None] = lambda made: None,
    ) -> None:
        self.plan = plan
        self.redrawn = list(redrawn)
        self._dataset: NDArray[np.int16] = plan.columns["dataset"]
        self._plan_of = plan_of
        self._fillers_of = fillers_of
        self._batch_size = batch_size
        self._cache_dtype = cache_dtype
        self._known = known
        self._lock = threading.RLock()
        self._kept: dict[int, Pass] = {}
        self._walked = 0  # the epoch that whoever takes units has come to

    def of(self, row: int, epoch: int) -> Pass:
        """The pass that a row's latents in an epoch are of."""
        return self.at(self.number(row, epoch))

    def number(self, row: int, epoch: int) -> int:
        """The number of that pass."""
        return epoch if self.redrawn[int(self._dataset[row])] else EVERY_EPOCH

    def at(self, number: int) -> Pass:
        """A pass by its number, with what is cached of it located."""
        found = self._kept.get(number)
        if found is not None:
            return found
        with self._lock:
            if number not in self._kept:
                self._kept[number] = self._made(number)
            return self._kept[number]

    def take(self, micro: MicroBatch, only: int | None = None) -> list[Unit]:
        """The units that a micro-batch needs and no earlier one did. Micro-batches are walked through in order.

        `only` is the number of the one pass to take from.
        """
        self._walked = micro.epoch
        rows = [row for row in micro.samples.tolist() if only is None or self.number(row, micro.epoch) == only]
        return [unit for row in rows if (unit := self.of(row, micro.epoch).take(row)) is not None]

    def lacks(self, unit: Unit) -> bool:
        """Whether latents of a unit are still to be encoded, as far as is known."""
        return self.at(unit[0].number).lacks(unit[1])

    def put_back(self) -> None:
        """As if no unit had been taken."""
        with self._lock:
            for kept in self._kept.values():
                kept.put_back()

    @property
    def all_taken(self) -> bool:
        """Whether no epoch will need another unit."""
        return not any(self.redrawn) and self.at(EVERY_EPOCH).all_taken

    def forget(self, before: int) -> None:
        """This process trains no epoch before this one any more: what is not sealed of those need not be.

        Whoever takes units may still walk through the end of them, where nothing is left to encode but shares are counted.
        """
        with self._lock:
            over = [number for number in self._kept if EVERY_EPOCH < number < before]
            for number in over:
                for filler in self._kept[number].fillers.values():
                    filler.cache.give_up()
            for number in over:
                if number < self._walked:
                    for filler in self._kept.pop(number).fillers.values():
                        filler.cache.close()

    def _made(self, number: int) -> Pass:
        plan = self.plan if number in (EVERY_EPOCH, 0) else self._plan_of(number)
        members = [index for index, redrawn in enumerate(self.redrawn) if redrawn == (number != EVERY_EPOCH)]
        made = Pass(number, plan, self._fillers_of(plan, members, number), self._batch_size, self._cache_dtype)
        made.locate(self._known(made))
        return made
