"""How often datasets are drawn where nobody says so: by size, and regularization images as often as the others."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.config.datasets import DatasetConfig
from helpers.data.order.epoch_order import EpochOrder, Share
from helpers.data.planned import are_balanced, shares_of

SKS = DatasetConfig(id="sks")
FACES = DatasetConfig(id="faces", repeats=1)
CLASS = DatasetConfig(id="class", is_regularisation_data=True)
OTHER_CLASS = DatasetConfig(id="other class", is_regularisation_data=True)


def drawn(datasets: list[DatasetConfig], images: list[int], epochs: int = 3) -> list[float]:
    """The share of each dataset in the micro-batches of some epochs."""
    of_image = np.repeat(np.arange(len(images)), images)
    order = EpochOrder(np.zeros(sum(images), int), of_image, shares_of(datasets, np.array(images)), 1, seed=7)
    count = order.micro_batches(0, epochs)
    found = [of_image[order.step(step)[0].samples[0]] for step in range(count)]
    return (np.bincount(found, minlength=len(images)) / count).tolist()


@pytest.mark.parametrize("images", [[15, 85], [15, 1000], [40, 4]])
def test_regularization_images_are_half_however_many_there_are(images: list[int]) -> None:
    assert drawn([SKS, CLASS], images) == pytest.approx([0.5, 0.5], abs=0.02)


def test_the_datasets_of_each_kind_share_their_half_by_size() -> None:
    assert drawn([SKS, FACES, CLASS, OTHER_CLASS], [20, 20, 300, 100]) == pytest.approx([1 / 6, 1 / 3, 3 / 8, 1 / 8], abs=0.03)


@pytest.mark.parametrize("said", [{"probability": 0.3}, {"ignore_epochs": True}])
def test_what_the_user_says_counts_alone(said: dict[str, object]) -> None:
    own = DatasetConfig(id="class", is_regularisation_data=True, **said)  # type: ignore[arg-type]
    assert not are_balanced([SKS, own])
    assert shares_of([SKS, own], np.array([15, 85])) == [Share(), Share(0, own.probability, own.ignore_epochs)]


@pytest.mark.parametrize("datasets", [[SKS, FACES], [CLASS, OTHER_CLASS], [SKS]])
def test_datasets_of_one_kind_are_mixed_by_size(datasets: list[DatasetConfig]) -> None:
    assert not are_balanced(datasets)
    assert all(share.probability is None for share in shares_of(datasets, np.full(len(datasets), 9)))
