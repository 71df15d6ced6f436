"""Latents encoded while training runs, in the order in which training needs them.

A thread walks through the steps to come and takes each unit when its first row is met. Every process walks through the steps of all
processes and encodes every n-th unit of that walk, so shares are disjoint without a word between them; what another process
encodes is found in the shared cache, and what it could not encode in the catalogue. No process waits for another in any other way.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from helpers.data.cache.cache import Writer
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.fill import FillOptions
from helpers.data.encode.latents import EVERY_EPOCH, LatentEncoder, Member, Unit, encode_units, refuse_without_images
from helpers.data.encode.passes import HeldCodec, Pass, Passes
from helpers.data.order.epoch_order import MicroBatch
from helpers.errors import Interrupted

POLL_SECONDS = 0.05  # between two looks for what another process encodes
SHARE_SECONDS = 2.0  # after which what has been encoded is there for other processes


class BackgroundEncoder:
    """Encodes latents in a thread of its own between `start` and `close`, and knows what of them is not in the cache yet.

    Passes of single epochs are encoded up to the epoch after the one that training has reached. The codec is let go when nothing
    is left to encode. What fails in the thread is raised by `check` and by waiting for latents.
    """

    def __init__(self, passes: Passes, codec: HeldCodec, catalogue: Catalogue, options: FillOptions) -> None:
        self._passes = passes
        self._codec = codec
        self._catalogue = catalogue
        share = SHARE_SECONDS if options.world_size > 1 else options.seal_after
        self._options = dataclasses.replace(options, should_stop=self._is_closed, seal_after=share)
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self.finished = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._horizon = 0
        # Encoded by this process and not sealed: (pass, row of the plan) => writer, key, and the shards the writer had sealed before.
        self._open: dict[tuple[int, int], tuple[Writer, bytes, int]] = {}

    def start(self, micro_batches: Callable[[], Iterator[MicroBatch]]) -> None:
        """Begin to encode what these micro-batches need, those of all processes in the order of training."""
        self._codec.open()
        self._passes.put_back()
        self._closed.clear()
        self.finished, self._error, self._horizon = False, None, 0
        self._thread = threading.Thread(target=self._work, args=(micro_batches,), name="latents", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop encoding and end all waiting; what has been encoded is sealed. Does nothing before `start`."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what has failed in the thread."""
        if self._error is not None:
            raise self._error

    def reached(self, epoch: int) -> None:
        """Training has come to this epoch: the one after may be encoded."""
        self._horizon = max(self._horizon, epoch)

    def wait_for(self, wanted: Pass, row: int) -> dict[str, Tensor] | None:
        """The latents of a row of the plan as soon as some process has encoded them; None where that cannot be done.

        DamagedRecordError when they are not what was written.
        """
        image = int(wanted.plan.columns["row"][row])
        while True:
            finished = self.finished
            opened = self._open.get((wanted.number, row))
            if opened is not None and (record := opened[0].get(opened[1])) is not None:
                return record
            location = wanted.locate_row(row)
            if location["shard"]:
                return wanted.fillers[int(wanted.plan.columns["dataset"][row])].cache.read(location)
            if self._catalogue.has_failed(wanted.number, image):
                return None
            self.check()
            if finished and self._options.world_size == 1:
                raise RuntimeError(f"row {row} of pass {wanted.number} was never encoded")
            if self._closed.is_set():
                raise Interrupted("stopped while training waited for latents; what has been encoded is kept, start again to go on")
            with self._changed:
                self._changed.wait(POLL_SECONDS)

    # -- the thread -------------------------------------------------------------------------------------------------------

    def _work(self, micro_batches: Callable[[], Iterator[MicroBatch]]) -> None:
        try:
            encode_units(self._units(micro_batches()), self._catalogue, self._options, self._stored)
            self._refuse_without_images()
        except Interrupted:
            pass  # by `close`
        except BaseException as error:
            self._error = error
        finally:
            self._codec.close()
            self.finished = True
            with self._changed:
                self._changed.notify_all()

    def _units(self, micro_batches: Iterator[MicroBatch]) -> Iterator[Unit | None]:
        """This process's units that lack something; None while training has to catch up."""
        met = 0
        for micro in micro_batches:
            while micro.epoch > self._horizon + 1:
                yield None
            for unit in self._passes.take(micro):
                if met % self._options.world_size == self._options.rank and self._passes.lacks(unit):
                    yield unit
                met += 1
            if self._passes.all_taken:
                return

    def _stored(self, filler: LatentEncoder, members: Sequence[Member], writer: Writer) -> None:
        """In the writer's thread: a unit has just been given to its writer."""
        self._open = {place: opened for place, opened in self._open.items() if _is_open(*opened)}
        for member in members:
            if member.missing and not member.problem:
                self._open[filler.number, member.planned] = (writer, member.record_key, writer.sealed)
        with self._changed:
            self._changed.notify_all()

    def _is_closed(self) -> bool:
        return self._closed.is_set()

    def _refuse_without_images(self) -> None:
        every = self._passes.at(EVERY_EPOCH)
        failed = self._catalogue.failures()
        for filler in every.fillers.values():
            refuse_without_images(filler, failed)


def _is_open(writer: Writer, key: bytes, sealed_before: int) -> bool:
    """Whether a record may still be in its writer's open shard, and be needed."""
    return writer.sealed == sealed_before and not writer.cache.given_up
