"""What the preparation of data gets from the run: settings as plain values, and the run's other parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from helpers.data.base.workers import Workers
from helpers.data.encode.common import EncodeOptions, available_threads
from helpers.data.order.epoch_order import FROM_THE_BEGINNING, OrderStart
from helpers.data.ports import DataReporter, ModelEncoders
from helpers.storage.memo import Memo


@dataclass(frozen=True)
class DataSettings:
    """Settings of the preparation of data, besides the datasets."""

    output_dir: Path  # dataset_report.json goes here
    cache_dir: Path  # the catalogue and the plan go here
    text_cache_dir: Path  # of the extra captions and the unconditional
    device: torch.device  # that encodes
    seed: int
    batch_size: int
    accumulation: int = 1  # micro-batches of one process in a step
    caption_dropout: float = 0.0
    encoders_apart: Sequence[str] = ()  # text encoders that drop captions independently
    cache_dtype: str = "auto"  # auto, fp16, bf16 or fp32
    vae_batch_size: int = 4
    text_batch_size: int = 16
    threads: int = field(default_factory=available_threads)  # that read, decode and resize images, over all processes
    extra_captions: Sequence[str] = ()  # besides those of the datasets, such as validation prompts
    live_text: bool = False  # the text encoders are trained: captions are encoded in every step and none is cached
    encode_while_training: bool = False  # latents, each a little before it is needed; else all before training
    step: int = 0  # that training starts or resumes with, counted from 0
    order: OrderStart = FROM_THE_BEGINNING
    # By dataset, the images that were left out as undecodable when the run began; None for a new run.
    undecodable: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True)
class DataContext:
    """What a run gives to everything that prepares its data."""

    settings: DataSettings
    family: ModelEncoders
    workers: Workers
    report: DataReporter

    @property
    def memo(self) -> Memo:
        """Results of earlier starts."""
        return Memo(self.settings.cache_dir / "memo")

    def encode_options(self, batch_size: int) -> EncodeOptions:
        """How this process encodes."""
        settings, workers = self.settings, self.workers
        return EncodeOptions(batch_size, settings.cache_dtype, max(1, settings.threads // workers.world_size), workers)
