"""The data of a run once it is scanned and planned, and the order in which it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from helpers.config.datasets import DatasetConfig
from helpers.data.base.sample import Sample
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.encode.companions import Kind
from helpers.data.order.epoch_order import EpochOrder, Share
from helpers.data.order.steps import Steps
from helpers.data.plan.buckets import BucketPlan, plan
from helpers.data.planning import columns_of, plan_inputs
from helpers.data.settings import DataContext
from helpers.storage.backend import SourceBackend


@dataclass(frozen=True)
class PlannedData:
    """The data of a run after its scan: which images there are, where their files are read from, and how they are cropped."""

    datasets: Sequence[DatasetConfig]  # of images, in the order of the plan
    sources: Mapping[str, SourceBackend]  # of these datasets and of their companions' datasets, by id
    companions: Sequence[tuple[Kind, ...]]  # of the images of each dataset
    catalogue: Catalogue
    plan: BucketPlan  # of epoch 0
    seed: int

    def plan_of(self, epoch: int) -> BucketPlan:
        """The plan of an epoch. Its rows are the images of `plan` in the same order; redrawn datasets are cropped in another way."""
        if epoch == 0:
            return self.plan
        return plan([columns_of(dataset, self.catalogue, self.seed, epoch) for dataset in self.datasets])

    def shapes_of(self, epoch: int) -> NDArray[np.int16]:
        """(N,) the shape of each row in the plan of an epoch, an index into its `shapes`."""
        return self.plan_of(epoch).columns["shape"]

    def digest(self) -> str:
        """A digest of everything that the plan depends on, as it is in the catalogue now."""
        return plan_inputs(self.datasets, self.catalogue, self.seed)

    @cached_property
    def _dataset(self) -> NDArray[np.int16]:
        return self.plan.columns["dataset"]

    def dataset_of(self, row: int) -> int:
        """The index of the dataset that a row of the plan belongs to."""
        return int(self._dataset[row])

    def sample(self, row: int) -> Sample:
        """The image of a row of the plan."""
        return self.catalogue.sample(int(self.plan.columns["row"][row]))


def steps_of(data: PlannedData, context: DataContext) -> Steps:
    """The order of training. It covers the whole plan: images that turn out not to be encodable leave their places empty."""
    settings, workers = context.settings, context.workers
    shares = shares_of(data.datasets, np.bincount(data.plan.columns["dataset"], minlength=len(data.datasets)))
    shapes = data.shapes_of if any(dataset.redraws_aspects for dataset in data.datasets) else data.plan.columns["shape"]
    order = EpochOrder(shapes, data.plan.columns["dataset"], shares, settings.batch_size, data.seed)
    return Steps(order, settings.accumulation, workers.rank, workers.world_size)


def shares_of(datasets: Sequence[DatasetConfig], images: NDArray[np.int64]) -> list[Share]:
    """How often each dataset is drawn; `images` (datasets,) is their number of images in use.

    Without any `probability`, regularization datasets (`are_balanced`) are together drawn as often as the others, however many images they
    have, and do not hold the epoch open. Among themselves, the datasets of each kind are drawn by their sizes.
    """
    if not are_balanced(datasets):
        return [Share(dataset.repeats, dataset.probability, dataset.ignore_epochs) for dataset in datasets]
    marked = np.array([dataset.is_regularisation_data for dataset in datasets])
    sizes = images * np.array([dataset.repeats + 1 for dataset in datasets], float)
    of_kind = np.where(marked, sizes[marked].sum(), sizes[~marked].sum())
    weights = sizes / np.maximum(of_kind, 1.0)
    return [
        Share(dataset.repeats, weight, dataset.is_regularisation_data) for dataset, weight in zip(datasets, weights.tolist(), strict=True)
    ]


def are_balanced(datasets: Sequence[DatasetConfig]) -> bool:
    """Whether regularization images and the others are drawn equally often: where there are both, and the user set no shares."""
    kinds = {dataset.is_regularisation_data for dataset in datasets}
    return len(kinds) == 2 and not any(dataset.probability is not None or dataset.ignore_epochs for dataset in datasets)
