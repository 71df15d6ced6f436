"""Addressed randomness: a number is drawn for a name and an address, never from a stream that remembers.

Whatever is drawn for (seed, step, place) is the same on one process or eight, in a run that was stopped ten times or never.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

Address = int | str


def seed_of(name: str, *address: Address) -> int:
    """A 63-bit seed that depends on every part of the address and on nothing else."""
    digest = hashlib.blake2b(repr((name, *address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(name: str, *address: Address) -> torch.Generator:
    """A fresh CPU generator for one address. Drawing on the CPU gives the same numbers whatever the device."""
    return torch.Generator().manual_seed(seed_of(name, *address))


def uniform(name: str, *address: Address) -> float:
    """One number in [0, 1) for an address; needs no generator, so it is cheap enough for every sample of a plan."""
    return (seed_of(name, *address) >> 10) / 2.0**53


@dataclass(frozen=True)
class StepDraws:
    """The randomness of some samples of one global step, addressed by their place in it.

    `places` are positions from 0 within the global step, `step_samples` its size over all processes and rounds.
    """

    seed: int
    step: int
    places: tuple[int, ...]
    step_samples: int

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) standard normal numbers, float32, on the CPU."""
        return torch.stack([torch.randn(shape, generator=self._at(name, place)) for place in self.places])

    def uniform(self, name: str) -> Tensor:
        """(B,) independent uniform numbers in [0, 1), float64."""
        return torch.tensor([uniform(name, self.seed, self.step, place) for place in self.places], dtype=torch.float64)

    def step_uniform(self, name: str) -> float:
        """One number in [0, 1) for the whole global step, the same on every process."""
        return uniform(name, self.seed, self.step)

    def strata(self, name: str) -> Tensor:
        """(B,) numbers in [0, 1), float64: one from each of `step_samples` equal strata of the global step, in random order.

        The strata are dealt to the places anew each step, so a place is not always the noisiest.
        """
        order = torch.randperm(self.step_samples, generator=generator(f"{name}/order", self.seed, self.step))
        offsets = self.uniform(name)
        return (order[list(self.places)].double() + offsets) / self.step_samples

    def _at(self, name: str, place: int) -> torch.Generator:
        return generator(name, self.seed, self.step, place)
