"""Captions in a run that trains the text encoders: encoded anew in every step, since what was encoded before is out of date."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch

from helpers.data.batches import Batch
from helpers.data.ports import TextTensors
from helpers.protocols import ModelFamily, TextTrainingFamily, Trainable, can_train_text_encoders
from helpers.training.engine import Engine


def stop_of(limit: int, total: int, settled: int | None) -> int:
    """The step that the text encoders stop before, counted from 0: `limit` percent of all steps, rounded up; from 100 on, never.

    `settled` is what a checkpoint says: a run that is made longer does not set encoders in motion again that have stopped.
    """
    if limit >= 100:
        return total
    return math.ceil(total * limit / 100) if settled is None else settled


def live_text(family: ModelFamily, trainable: Trainable, engine: Engine) -> LiveText | None:
    """None where no text encoder is trained."""
    if not trainable.text_encoders:
        return None
    assert can_train_text_encoders(family), "only such a family has text encoders that are trained"
    return LiveText(family, trainable, engine)


class LiveText:
    """What captions become by the text encoders as they are now. Before step `engine.text_stop` gradients reach the encoders."""

    def __init__(self, family: TextTrainingFamily, trainable: Trainable, engine: Engine) -> None:
        self.family = family
        self.trainable = trainable
        self.engine = engine

    def encode(self, batch: Batch, step: int) -> Batch:
        """The batch of a step, counted from 0, with its text."""
        moving = step < self.engine.text_stop
        for encoder in self.trainable.text_encoders.values():
            encoder.train(moving)
        encoders = self.engine.text_encoders if moving else self.trainable.text_encoders
        captions = [None if dropped else caption for caption, dropped in zip(batch.captions, batch.dropped, strict=True)]
        with contextlib.nullcontext() if moving else torch.no_grad():
            return dataclasses.replace(batch, text=self.family.embed(encoders, captions, self.engine.runtime.device))

    def of(self, caption: str | None) -> TextTensors:
        """One caption's tensors, without a batch dimension, None being the unconditional; for pictures."""
        with torch.no_grad():
            told = self.family.embed(self.trainable.text_encoders, [caption], self.engine.runtime.device)
        return {name: tensor[0].float() for name, tensor in told.items()}
