"""From datasets to training data: scan, plan, report, encode what is missing, free the encoders.

Nothing here depends on what an earlier run did, only on what is on disk: a second start finds everything there, opens no image and loads
no encoder. The first process scans and plans; all processes encode, each its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from helpers.config.datasets import DatasetConfig
from helpers.data.base.sample import CONDITION, MASK
from helpers.data.base.workers import Workers
from helpers.data.batches import BatchMaker
from helpers.data.encode.encoder import LatentEncoder
from helpers.data.encode.texts import TextStore
from helpers.data.fingerprint import DataFingerprint
from helpers.data.planned import PlannedData, are_balanced, steps_of
from helpers.data.report.dataset_report import BALANCED, mix_summary
from helpers.data.scanning import Scanner
from helpers.data.settings import DataContext, DataSettings
from helpers.data.surveying import Surveyor
from helpers.data.training_data import CachedRecords, TrainingData

if TYPE_CHECKING:
    from helpers.data.ports import DataReporter, ModelEncoders


def prepare_data(
    datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelEncoders, workers: Workers, report: DataReporter
) -> TrainingData:
    """Put everything on disk that training needs, and return what reads it.

    Raises DataError where training cannot start from these datasets, StorageError where a store fails, and Interrupted when the user
    asked to stop; what has been encoded by then is kept.
    """
    context = DataContext(settings, family, workers, report)
    scanner = Scanner(datasets, context)
    data = scanner.run()
    surveyor = Surveyor(data, scanner, context)
    surveyor.describe()

    steps = steps_of(data, context)
    encoder, texts = LatentEncoder(data, steps, context), TextStore(data, context)
    if settings.encode_while_training:
        texts.encode()
        encoder.locate()
    else:
        encoder.drain()
        texts.encode()
    surveyor.update()
    encoder.prepare_thread()

    if len(datasets) > 1:
        report.chapter("mix", mix_summary(data.plan.datasets, steps.order.mix))
        if are_balanced(data.datasets):
            report.chapter("", BALANCED)
    records = CachedRecords(data, family, encoder, texts)
    maker = BatchMaker(records, settings.seed, settings.caption_dropout, settings.encoders_apart)
    fixed = _fixed(data, settings, encoder.codec.fingerprint, texts.fingerprint)
    fingerprint = DataFingerprint(data, fixed, context.memo if workers.is_first else None)
    return TrainingData(records, steps, maker, fingerprint, _undecodable(data, settings), surveyor)


def survey_data(
    datasets: Sequence[DatasetConfig], settings: DataSettings, family: ModelEncoders, workers: Workers, report: DataReporter
) -> None:
    """Scan, plan and report as `prepare_data` does, and encode nothing. Raises the same errors."""
    context = DataContext(settings, family, workers, report)
    scanner = Scanner(datasets, context)
    Surveyor(scanner.run(), scanner, context).describe(anew=True)


def _undecodable(data: PlannedData, settings: DataSettings) -> dict[str, Sequence[str]]:
    """By dataset, the images that are left out as undecodable: those of the checkpoint, or those that are known now."""
    if settings.undecodable is not None:
        return dict(settings.undecodable)
    return {dataset.id: data.catalogue.undecodable(dataset.id) for dataset in data.datasets}


def _fixed(data: PlannedData, settings: DataSettings, image_codec: str, text_encoders: str) -> dict[str, str]:
    """What of the fingerprint does not depend on files."""
    fixed = {
        "repeats": ", ".join(f"{dataset.id} {dataset.repeats}" for dataset in data.datasets),
        "redrawn": ", ".join(dataset.id for dataset in data.datasets if dataset.vae_cache_clear_each_epoch),
        "mix": ", ".join(_part_in_the_mix(dataset, are_balanced(data.datasets)) for dataset in data.datasets),
        "batch_size": str(settings.batch_size),
        "image_codec": f"{image_codec} {settings.cache_dtype}",
        "text_encoders": f"{text_encoders} {settings.cache_dtype}",
    }
    pairs = [(dataset, kind) for dataset, kinds in zip(data.datasets, data.companions, strict=True) for kind in kinds]
    if conditions := [f"{dataset.id} {kind.fact}" for dataset, kind in pairs if kind.role == CONDITION]:
        fixed["conditions"] = ", ".join(conditions)
    if masks := [f"{dataset.id} {kind.fact} outside {dataset.mask_outside_weight:g}" for dataset, kind in pairs if kind.role == MASK]:
        fixed["masks"] = ", ".join(masks)
    return fixed


def _part_in_the_mix(dataset: DatasetConfig, balanced: bool) -> str:
    probability = "balanced" if balanced else "by size" if dataset.probability is None else f"{dataset.probability:g}"
    return f"{dataset.id} {probability}{' without holding epochs open' if dataset.ignore_epochs else ''}"
