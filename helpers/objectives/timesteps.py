"""Which timesteps of a diffusion schedule are trained, and how often each is drawn. `uniform_numbers` is for all objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.data.base.draws import StepDraws


def uniform_numbers(options: ObjectiveOptions, draws: StepDraws) -> Tensor:
    """(B,) numbers in [0, 1), float64: independent, or stratified over all samples of the step (one number in each of N equal parts)."""
    return draws.uniform("timestep") if options.disable_segmented_timestep_sampling else draws.strata("timestep")


class TimestepDistribution:
    """The probability of each trained timestep of a schedule of `total`.

    Uniform numbers become timesteps by the inverse of the cumulative distribution. It is monotone, so stratified numbers give stratified
    timesteps, with any bias and any number of samples in a step. Raises ConfigError where no timestep is left to train or to prefer.
    """

    def __init__(self, options: ObjectiveOptions, total: int) -> None:
        self.interval = trained_timesteps(options, total)
        self.cumulative = _cumulative(self.interval, _preferred(options, self.interval, total), options.timestep_bias_multiplier)

    def at(self, uniform: Tensor) -> Tensor:
        """(B,) numbers in [0, 1), float64 => (B,) timesteps, integers."""
        import torch

        return self.interval.start + torch.searchsorted(self.cumulative, uniform, right=True).clamp(max=len(self.interval) - 1)


def trained_timesteps(options: ObjectiveOptions, total: int) -> range:
    """All timesteps of a schedule of `total`, or with --refiner_training those of one of two experts.

    Two experts with the same strength cover the schedule without overlap or gap. Raises ConfigError where no timestep is left.
    """
    if not options.refiner_training:
        return range(total)
    border = round(options.refiner_training_strength * total)
    timesteps = range(border, total) if options.refiner_training_invert_schedule else range(border)
    if not timesteps:
        raise ConfigError(f"--refiner_training_strength={options.refiner_training_strength:g} leaves no timestep of {total} to train on.")
    return timesteps


def _preferred(options: ObjectiveOptions, interval: range, total: int) -> range:
    """The timesteps that are drawn --timestep_bias_multiplier times as often as the rest of the interval; empty without a bias."""
    strategy = options.timestep_bias_strategy
    if strategy == "none":
        return range(interval.start, interval.start)
    if strategy == "range":
        if options.timestep_bias_end > total:
            raise ConfigError(
                f"--timestep_bias_end={options.timestep_bias_end} is beyond the model's schedule of {total} timesteps; lower it."
            )
        part = range(max(options.timestep_bias_begin, interval.start), min(options.timestep_bias_end, interval.stop))
        flags = f"--timestep_bias_begin={options.timestep_bias_begin} and --timestep_bias_end={options.timestep_bias_end}"
    else:
        size = round(options.timestep_bias_portion * len(interval))
        part = interval[:size] if strategy == "earlier" else interval[len(interval) - size :]
        flags = f"--timestep_bias_portion={options.timestep_bias_portion:g}"
    trained = f"the {len(interval)} trained timesteps ({interval.start} to {interval.stop - 1})"
    if not part:
        raise ConfigError(f"{flags} selects none of {trained}; choose some of them.")
    if len(part) == len(interval):
        raise ConfigError(f"{flags} selects all of {trained}, and so prefers none; choose fewer.")
    return part


def _cumulative(interval: range, part: range, factor: float) -> Tensor:
    """(len(interval),) float64: the cumulative distribution over the interval's timesteps."""
    import torch

    weights = torch.ones(len(interval), dtype=torch.float64)
    weights[part.start - interval.start : part.stop - interval.start] = factor
    return weights.cumsum(0) / weights.sum()
