"""Addressed randomness: a random number is a function of a name and an address, never of what was drawn before.

    uniform("flip", seed, "photos", "cat.jpg")  # the same number in every run with this seed

So a draw for (seed, step, place) is the same with one process or eight, in a run that was resumed ten times or never.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

Address = int | str


def seed_of(name: str, *address: Address) -> int:
    """A 63-bit seed, a hash of the name and every part of the address."""
    digest = hashlib.blake2b(repr((name, *address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(name: str, *address: Address) -> torch.Generator:
    """A new CPU generator for one address. The CPU gives the same numbers whatever device trains."""
    return torch.Generator().manual_seed(seed_of(name, *address))


def uniform(name: str, *address: Address) -> float:
    """One number in [0, 1) for an address. It needs no generator, so it is cheap enough for every sample of a plan."""
    return (seed_of(name, *address) >> 10) / 2.0**53


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of B samples of one global step.

    `places` are their positions in the step, counted from 0 over all processes and accumulation rounds. The step has `step_samples`
    samples.
    """

    seed: int
    step: int
    places: tuple[int, ...]
    step_samples: int

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal noise of shape (B, *shape), float32, on the CPU."""
        return torch.stack([torch.randn(shape, generator=self._at(name, place)) for place in self.places])

    def uniform(self, name: str) -> Tensor:
        """Independent uniform numbers in [0, 1), of shape (B,), float64."""
        return torch.tensor([uniform(name, self.seed, self.step, place) for place in self.places], dtype=torch.float64)

    def step_uniform(self, name: str) -> float:
        """One uniform number in [0, 1) for the whole step, the same on every process."""
        return uniform(name, self.seed, self.step)

    def strata(self, name: str) -> Tensor:
        """Stratified uniform numbers in [0, 1), of shape (B,), float64.

        [0, 1) is divided into `step_samples` equal intervals, and each sample of the step gets a number from its own interval. Which
        interval a place gets is drawn anew in every step.
        """
        order = torch.randperm(self.step_samples, generator=generator(f"{name}/order", self.seed, self.step))
        offsets = self.uniform(name)
        return (order[list(self.places)].double() + offsets) / self.step_samples

    def _at(self, name: str, place: int) -> torch.Generator:
        return generator(name, self.seed, self.step, place)
