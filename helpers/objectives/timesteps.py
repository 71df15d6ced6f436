"""Which timesteps of a diffusion schedule are trained, and how often; and the uniform numbers that choose them, for every objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.config.options import ObjectiveOptions
    from helpers.data.base.draws import StepDraws


def uniform_numbers(options: ObjectiveOptions, draws: StepDraws) -> Tensor:
    """(B,) numbers in [0, 1), float64: one from each of as many equal strata as the global step has samples, or independent ones."""
    return draws.uniform("timestep") if options.disable_segmented_timestep_sampling else draws.strata("timestep")


class TimestepDistribution:
    """The timesteps of a schedule of `total` that are drawn, and their cumulative distribution.

    Uniform numbers become timesteps by its inverse, which is monotone: strata of the numbers are equally likely, disjoint parts of the
    distribution, whatever is biased, and every part of the trained interval has its share at every number of samples in a step.
    Raises ConfigError where nothing is left to train, or to prefer.
    """

    def __init__(self, options: ObjectiveOptions, total: int) -> None:
        self.interval = trained_timesteps(options, total)
        self.cumulative = _cumulative(self.interval, _preferred(options, self.interval, total), options.timestep_bias_multiplier)

    def at(self, uniform: Tensor) -> Tensor:
        """(B,) numbers in [0, 1), float64 => (B,) timesteps, integers."""
        import torch

        return self.interval.start + torch.searchsorted(self.cumulative, uniform, right=True).clamp(max=len(self.interval) - 1)


def trained_timesteps(options: ObjectiveOptions, total: int) -> range:
    """All timesteps of a schedule of `total`, or those that one of two experts is for.

    Both experts of one strength share the schedule without overlap or gap. Raises ConfigError when nothing is left to train.
    """
    if not options.refiner_training:
        return range(total)
    border = round(options.refiner_training_strength * total)
    timesteps = range(border, total) if options.refiner_training_invert_schedule else range(border)
    if not timesteps:
        raise ConfigError(f"--refiner_training_strength={options.refiner_training_strength:g} leaves no timestep of {total} to train on.")
    return timesteps


def _preferred(options: ObjectiveOptions, interval: range, total: int) -> range:
    """The timesteps that are drawn --timestep_bias_multiplier times as often as the rest of the interval; none without a bias."""
    strategy = options.timestep_bias_strategy
    if strategy == "none":
        return range(interval.start, interval.start)
    if strategy == "range":
        if options.timestep_bias_end > total:
            raise ConfigError(
                f"--timestep_bias_end={options.timestep_bias_end} is beyond the model's schedule of {total} timesteps; lower it."
            )
        part = range(max(options.timestep_bias_begin, interval.start), min(options.timestep_bias_end, interval.stop))
        said = f"--timestep_bias_begin={options.timestep_bias_begin} and --timestep_bias_end={options.timestep_bias_end}"
    else:
        size = round(options.timestep_bias_portion * len(interval))
        part = interval[:size] if strategy == "earlier" else interval[len(interval) - size :]
        said = f"--timestep_bias_portion={options.timestep_bias_portion:g}"
    trained = f"the {len(interval)} timesteps that are trained ({interval.start} to {interval.stop - 1})"
    if not part:
        raise ConfigError(f"{said} hold none of {trained}; there is nothing to draw more often.")
    if len(part) == len(interval):
        raise ConfigError(f"{said} hold all of {trained}, so that none would be drawn more often than another; choose fewer.")
    return part


def _cumulative(interval: range, part: range, factor: float) -> Tensor:
    """(len(interval),) float64: the chance of a timestep, of the interval, up to and with each."""
    import torch

    weights = torch.ones(len(interval), dtype=torch.float64)
    weights[part.start - interval.start : part.stop - interval.start] = factor
    return weights.cumsum(0) / weights.sum()
