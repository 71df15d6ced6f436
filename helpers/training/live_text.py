"""Captions in a run that trains the text encoders: encoded in every step, since cached embeddings would be out of date."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch

from helpers.data.batches import Batch
from helpers.data.ports import TextTensors
from helpers.protocols import ModelFamily, TextTrainingFamily, Trainable, can_train_text_encoders
from helpers.training.engine import Engine


def text_stop(limit: int, total: int, saved: int | None) -> int:
    """The first step, counted from 0, that no longer trains the text encoders: `limit` percent of all steps, rounded up.

    From 100 percent on they are trained to the end. `saved` is the checkpoint's: extending a run does not train stopped encoders again.
    """
    if limit >= 100:
        return total
    return math.ceil(total * limit / 100) if saved is None else saved


def live_text(family: ModelFamily, trainable: Trainable, engine: Engine) -> LiveText | None:
    """None if no text encoder is trained."""
    if not trainable.text_encoders:
        return None
    assert can_train_text_encoders(family), "only such a family has text encoders that are trained"
    return LiveText(family, trainable, engine)


class LiveText:
    """Encodes captions with the text encoders as they are now. Before step `engine.text_stop`, gradients flow into the encoders."""

    def __init__(self, family: TextTrainingFamily, trainable: Trainable, engine: Engine) -> None:
        self.family = family
        self.trainable = trainable
        self.engine = engine

    def encode(self, batch: Batch, step: int) -> Batch:
        """The batch with its text embeddings added. Steps count from 0."""
        trained = step < self.engine.text_stop
        for encoder in self.trainable.text_encoders.values():
            encoder.train(trained)
        encoders = self.engine.text_encoders if trained else self.trainable.text_encoders
        captions = [None if dropped else caption for caption, dropped in zip(batch.captions, batch.dropped, strict=True)]
        with contextlib.nullcontext() if trained else torch.no_grad():
            return dataclasses.replace(batch, text=self.family.embed(encoders, captions, self.engine.runtime.device))

    def encode_caption(self, caption: str | None) -> TextTensors:
        """One caption's tensors without a batch dimension, for validation images. None is the unconditional."""
        with torch.no_grad():
            tensors = self.family.embed(self.trainable.text_encoders, [caption], self.engine.runtime.device)
        return {name: tensor[0].float() for name, tensor in tensors.items()}
