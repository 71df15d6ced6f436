"""Compare the training step of this installation with formulas and numbers of the papers: `./simpletuner selftest`.

Each row runs the code that training runs (`Diffusion` and `FlowMatching`), on the schedule of Stable Diffusion: scaled-linear betas from
0.00085 to 0.012 over 1000 timesteps. S is the signal-to-noise ratio, abar / (1 - abar).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from helpers.config.options import ObjectiveOptions
from helpers.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.objectives.diffusion import Diffusion
    from helpers.objectives.flow import FlowMatching
    from helpers.protocols import Corrupted

SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SAMPLES = 2000  # of measurements with random numbers


@dataclass(frozen=True)
class Row:
    """One check: expected numbers, from a formula or a paper, and computed ones; `within` is the largest difference allowed."""

    what: str
    expected: tuple[float, ...]
    got: tuple[float, ...]
    within: float

    @property
    def ok(self) -> bool:
        """Infinity and NaN are never right."""
        near = (abs(one - other) <= self.within for one, other in zip(self.expected, self.got, strict=True))
        return all(near)


def rows() -> Iterator[Row]:
    for group in (_predictions, weights, _huber, masks, _zero_snr, _noise, _experts, _bias, _flow_timesteps, _flow):
        yield from group()


def _predictions() -> Iterator[Row]:
    exact = [_exact(_diffusion(prediction_type=name)) for name in PREDICTIONS]
    yield Row("loss of the exact prediction: epsilon, v, sample, flow", (0, 0, 0, 0), (*exact, _exact(_flow_objective())), 0)
    losses = {name: _loss_of_a_wrong_image(name, 400) for name in PREDICTIONS}
    ratios = tuple(losses[name] / losses["sample"] for name in ("epsilon", "v_prediction"))
    yield Row("loss of one wrong image, over that of sample: epsilon S, v S + 1, at t = 400", (0.737568, 1.737568), ratios, 1e-4)


def weights() -> Iterator[Row]:
    """Loss weights in a training step; S in the labels is the signal-to-noise ratio."""

    def min_snr(prediction: str, *timesteps: int) -> tuple[float, ...]:
        return tuple(_weight(_diffusion(prediction_type=prediction, loss_weighting="min_snr", snr_gamma=5.0), t) for t in timesteps)

    yield Row(
        "min-SNR 5, epsilon, min(S, 5) / S, at t = 0, 100, 250, 999", (0.004254, 0.591445, 1, 1), min_snr("epsilon", 0, 100, 250, 999), 5e-6
    )
    v = (0.004250, 0.528884, 0.673792, 0.276332, 0.004660)
    yield Row("min-SNR 5, v, min(S, 5) / (S + 1), at t = 0, 100, 250, 500, 999", v, min_snr("v_prediction", 0, 100, 250, 500, 999), 5e-6)
    yield Row("min-SNR 5, sample, min(S, 5), at t = 0, 100, 400", (5, 5, 0.737568), min_snr("sample", 0, 100, 400), 5e-5)
    yield Row(
        "soft min-SNR 5, sample, 5 S / (S + 5), of S = 0.1, 1, 5, 50",
        (0.0980, 0.8333, 2.5, 4.5455),
        _at_snr("soft_min_snr", "sample", 0.1, 1, 5, 50),
        5e-5,
    )
    of_level = _weight(_diffusion(prediction_type="sample", loss_weighting="soft_min_snr", snr_gamma=1 / 0.5**2), 400)
    level = 1 / 0.737568  # sigma^2
    yield Row("soft min-SNR 4, sample, 1 / (s^2 + 0.5^2), s^2 = (1 - abar) / abar, at t = 400", (1 / (level + 0.25),), (of_level,), 1e-5)
    yield Row("debiased, epsilon, 1 / sqrt(S), of S = 0.04, 1, 25", (5, 1, 0.2), _at_snr("debiased", "epsilon", 0.04, 1, 25), 1e-6)
    plain = _weight(_diffusion(snr_weight=2.0), 100)
    yield Row("no weighting: --snr_weight=2", (2,), (plain,), 0)


def _huber() -> Iterator[Row]:
    objective = _diffusion(loss="huber", huber_delta=0.1)
    corrupted = _at(objective, 400, _images(1))
    got = tuple(objective.loss(corrupted.target + error, corrupted).item() for error in (0.05, 0.1, 1.0))
    yield Row("Huber 0.1, e^2 and 0.1 (2 |e| - 0.1), of e = 0.05, 0.1, 1", (0.0025, 0.01, 0.19), got, 1e-6)


def masks() -> Iterator[Row]:
    """Loss masks; errors of 1 in the left half of an image, and of 3 in the right half."""
    import torch

    objective = _diffusion()
    corrupted = _at(objective, 400, _images(1))
    error = torch.ones_like(corrupted.target)
    half = error.shape[-1] // 2
    error[..., half:] = 3

    def mask(left: float, right: float) -> Tensor:
        found = torch.full_like(error[:, :1], left)
        found[..., half:] = right
        return found

    pairs = ((1, 0), (0.2, 0), (0, 1), (0.25, 0.75))
    got = tuple(objective.loss(corrupted.target + error, corrupted, mask(*pair)).item() for pair in pairs)
    yield Row("masked loss, sum(m e^2) / sum(m), of m = (1, 0), (0.2, 0), (0, 1), (0.25, 0.75)", (1, 1, 9, 7), got, 1e-4)
    prediction = (corrupted.target + error).requires_grad_()
    objective.loss(prediction, corrupted, mask(1, 0)).sum().backward()
    assert prediction.grad is not None
    outside = prediction.grad[..., half:].abs().max().item()
    yield Row("gradient where the mask is 0", (0,), (outside,), 0)


def _zero_snr() -> Iterator[Row]:
    plain = _diffusion(prediction_type="v_prediction", loss_weighting="min_snr", snr_gamma=5.0)
    zero = _diffusion(prediction_type="v_prediction", loss_weighting="min_snr", snr_gamma=5.0, rescale_betas_zero_snr=True)
    ends = tuple(objective.alphas_cumprod[-1].sqrt().item() for objective in (plain, zero))
    starts = tuple(objective.alphas_cumprod[0].item() for objective in (plain, zero))
    yield Row("zero terminal SNR: sqrt(abar) at the end, without and with", (0.068265, 0), ends, 1e-6)
    yield Row("zero terminal SNR: abar at the start, without and with", (0.99915, 0.99915), starts, 1e-6)
    yield Row("zero terminal SNR: min-SNR weight of v at the last timestep, pure noise", (0,), (_weight(zero, 999),), 0)
    yield Row("zero terminal SNR with epsilon is refused (1 is yes)", (1,), (_refused(rescale_betas_zero_snr=True),), 0)
    yield Row("trailing spacing, round(T - i T / n) - 1, n = 10: first, second, last", (999, 899, 99), _sampled("trailing"), 0)
    yield Row("leading spacing misses the end: first, second, last", (900, 800, 0), _sampled("leading"), 0)


def _noise() -> Iterator[Row]:
    objective = _diffusion()
    sigmas = []
    for timestep in (0, 1):
        corrupted = _at(objective, timestep, 0 * _images(1))
        sigmas.append((corrupted.noisy / corrupted.target).median().item())
    second = math.sqrt(1 - (1 - 0.00085) * (1 - _beta(1)))
    yield Row("noise level at t = 0 and 1, sqrt(1 - abar) (0 in bfloat16)", (math.sqrt(0.00085), second), tuple(sigmas), 1e-5)

    offset = _diffusion(offset_noise=True, noise_offset=0.1, noise_offset_probability=1.0)
    noise = offset.corrupt(0 * _images(SAMPLES), _draws(SAMPLES)).target
    variance = noise.mean(dim=(2, 3)).var().item()
    yield Row("offset noise 0.1, 16 x 16: variance of a channel's mean, 1 / HW + 0.1^2", (1 / 256 + 0.01,), (variance,), 0.0008)
    yield Row("offset noise 0.1: variance of the noise, 1 + 0.1^2", (1.01,), (noise.var().item(),), 0.005)

    plain, perturbed = (_diffusion(input_perturbation=g).corrupt(0 * _images(SAMPLES), _draws(SAMPLES)) for g in (0.0, 0.1))
    yield Row("input perturbation 0.1: change of the target", (0,), ((perturbed.target - plain.target).abs().max().item(),), 0)
    ratio = ((perturbed.noisy - plain.noisy).var() / plain.noisy.var()).item()
    yield Row("input perturbation 0.1: added variance, relative to the noise, 0.1^2", (0.01,), (ratio,), 0.0005)


def _experts() -> Iterator[Row]:
    import torch

    for samples in (1, 8):
        seen = []
        for inverted in (False, True):
            chosen = _timesteps(_diffusion(refiner_training=True, refiner_training_invert_schedule=inverted), samples, 8 * SAMPLES)
            seen += [chosen.min().item(), chosen.max().item()]
        yield Row(f"two experts, strength 0.2, {samples} samples a step: ends of both", (0, 199, 200, 999), tuple(seen), 0)
    chosen = _timesteps(_diffusion(), 8, 8 * SAMPLES)
    apart = (chosen.sort(dim=1).values // 125).eq(torch.arange(8)).all(dim=1).double().mean().item()
    yield Row("8 samples a step: share of steps with one timestep in each eighth", (1,), (apart,), 0)
    first = chosen[:, 0].double().mean().item()
    yield Row("8 samples a step: mean timestep of the first sample", (499.5,), (first,), 3 * 288.7 / math.sqrt(SAMPLES))


def _bias() -> Iterator[Row]:
    for strategy in ("earlier", "later"):
        for samples in (1, 8):
            chosen = _timesteps(_diffusion(timestep_bias_strategy=strategy, timestep_bias_multiplier=3.0), samples, 8 * SAMPLES)
            inside = (chosen < 250 if strategy == "earlier" else chosen >= 750).double().mean().item()
            yield Row(f"bias 3 for the {strategy} quarter, {samples} samples a step: its share, 3 / (3 + 3)", (0.5,), (inside,), 0.012)


def _flow_timesteps() -> Iterator[Row]:
    drawn = _spread("logit_normal")
    got = (drawn.mean().item(), drawn.std().item(), drawn.quantile(0.05).item(), drawn.quantile(0.95).item())
    yield Row("logit-normal (0, 1): mean, standard deviation, 5 % and 95 % quantiles", (0.5, 0.208, 0.162, 0.838), got, 5e-4)
    shares = tuple(_share(_spread("mode", mode_scale=scale), 0.4, 0.6) for scale in (1.29, 0.81, -0.5))
    yield Row("mode 1.29, 0.81, -0.5: share between 0.4 and 0.6", (0.4595, 0.3355, 0.1566), shares, 5e-4)
    drawn = _spread("cosmap")
    density = tuple(_share(drawn, low, low + 0.01) / 0.01 for low in (0, 0.495))
    yield Row("cosmap: density 2 / (pi - 2 pi t + 2 pi t^2) at 0 and 0.5", (0.6366, 1.2732), density, 0.01)


def _flow() -> Iterator[Row]:
    import torch

    from helpers.objectives.flow import shifted

    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    yield Row(
        "shift 3, 3 t / (1 + 2 t), of 0.1, 0.25, 0.5, 0.75, 0.9", (0.25, 0.5, 0.75, 0.9, 0.9643), tuple(shifted(t, 3.0).tolist()), 5e-5
    )
    objective = _flow_objective()
    corrupted = objective.corrupt(_images(64), _draws(64))
    exact = objective.sigmas(_draws(64)) * 1000
    yield Row("error of the timesteps that the network gets", (0,), ((corrupted.timesteps.double() - exact).abs().max().item(),), 1e-4)
    sigma = (corrupted.timesteps / 1000).view(-1, 1, 1, 1)
    recovered = (corrupted.noisy - sigma * corrupted.target - _images(64)).abs().max().item()
    yield Row("error of the image x - s v of the exact prediction", (0,), (recovered,), 1e-5)
    wrong = corrupted.target + 0.1
    of_velocity = objective.loss(wrong, corrupted)
    of_image = ((corrupted.noisy - sigma * wrong - _images(64)) ** 2).mean(dim=(1, 2, 3))
    ratio = (of_image / of_velocity / sigma.flatten() ** 2).mean().item()
    yield Row("squared error of the image / (s^2 x that of the velocity)", (1,), (ratio,), 1e-3)


# -- calls of the objectives ------------------------------------------------------------------------------------------------


def _diffusion(**options: Any) -> Diffusion:
    from helpers.objectives.diffusion import Diffusion

    return Diffusion(replace(ObjectiveOptions(), **options), SCHEDULE)


def _flow_objective(**options: Any) -> FlowMatching:
    from helpers.objectives.flow import FlowMatching

    return FlowMatching(replace(ObjectiveOptions(), **options), {"shift": 3.0})


def _refused(**options: Any) -> float:
    try:
        _diffusion(**options)
    except ConfigError:
        return 1
    return 0


def _draws(samples: int, step: int = 1) -> Any:
    from helpers.data.base.draws import StepDraws

    return StepDraws(seed=1, step=step, places=tuple(range(samples)), step_samples=samples)


def _images(number: int) -> Tensor:
    """(number, 4, 16, 16), always the same."""
    import torch

    return torch.randn(number, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def _at(objective: Diffusion, timestep: int, latents: Tensor) -> Corrupted:
    """One sample with this timestep. In a stratified step of 1000 samples each timestep occurs once."""
    from helpers.data.base.draws import StepDraws

    place = objective.distribution.at(_draws(1000).strata("timestep")).tolist().index(timestep)
    return objective.corrupt(latents, StepDraws(seed=1, step=1, places=(place,), step_samples=1000))


def _weight(objective: Diffusion, timestep: int) -> float:
    return _at(objective, timestep, _images(1)).weight.item()


def _at_snr(weighting: str, prediction: str, *ratios: float) -> tuple[float, ...]:
    import torch

    from helpers.objectives.weights import loss_weight

    snr = torch.tensor(ratios, dtype=torch.float64)
    return tuple(loss_weight(weighting, snr / (1 + snr), 5.0, prediction).tolist())


def _exact(objective: Diffusion | FlowMatching) -> float:
    corrupted = objective.corrupt(_images(4), _draws(4))
    return objective.loss(corrupted.target, corrupted).max().item()


def _loss_of_a_wrong_image(prediction: str, timestep: int) -> float:
    """The loss of the prediction that stands for an image that is 0.1 too bright."""
    objective, image = _diffusion(prediction_type=prediction), _images(1)
    corrupted = _at(objective, timestep, image)
    signal = objective.alphas_cumprod[timestep].sqrt()
    sigma = (1 - objective.alphas_cumprod[timestep]).sqrt()
    wrong = image + 0.1
    noise = (corrupted.noisy - signal * wrong) / sigma
    prediction_of_it = {"epsilon": noise, "v_prediction": signal * noise - sigma * wrong, "sample": wrong}[prediction]
    return objective.loss(prediction_of_it, corrupted).item()


def _beta(timestep: int) -> float:
    """Scaled-linear: linear in the square root."""
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    return (first + (last - first) * timestep / 999) ** 2


def _sampled(spacing: str) -> tuple[float, ...]:
    """The first, second and last of ten sampling timesteps with the training schedule."""
    from diffusers import DDIMScheduler

    schedule = _diffusion(training_scheduler_timestep_spacing=spacing).scheduler_config
    scheduler: Any = DDIMScheduler.from_config(dict(schedule))
    scheduler.set_timesteps(10)
    return tuple(float(scheduler.timesteps[index]) for index in (0, 1, -1))


def _timesteps(objective: Diffusion, samples: int, number: int) -> Tensor:
    """(number // samples, samples): the timesteps of number // samples steps."""
    import torch

    from helpers.objectives.timesteps import uniform_numbers

    drawn = [uniform_numbers(objective.options, _draws(samples, step)) for step in range(number // samples)]
    return objective.distribution.at(torch.stack(drawn))


def _spread(scheme: str, **options: float) -> Tensor:
    """100,000 stratified timesteps."""
    import torch

    from helpers.objectives.flow import timesteps

    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    return timesteps(uniform, replace(ObjectiveOptions(), weighting_scheme=scheme, **options))  # type: ignore[arg-type]


def _share(drawn: Tensor, low: float, high: float) -> float:
    return ((drawn >= low) & (drawn < high)).double().mean().item()


# -- the table --------------------------------------------------------------------------------------------------------------


def table(checked: Sequence[Row]) -> str:
    lines = [("", "what", "expected", "got")]
    lines += [("ok" if row.ok else "WRONG", row.what, _numbers(row.expected), _numbers(row.got)) for row in checked]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join((*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3])).rstrip() for line in lines
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.5g}" for value in values)


def main(arguments: Sequence[str] | None = None, checks: Callable[[], Iterator[Row]] = rows) -> int:
    parser = argparse.ArgumentParser(
        prog="./simpletuner selftest",
        description="Compare the training step of this installation with formulas and numbers of the papers, and print a table:\n\n"
        "    ./simpletuner selftest\n\n"
        "The exit code is 1 if a number is wrong. It takes a few seconds on a CPU and needs no model and no data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    checked = list(checks())
    print(table(checked))
    wrong = sum(not row.ok for row in checked)
    print(f"{wrong} of {len(checked)} checks failed" if wrong else f"all {len(checked)} checks passed")
    return 1 if wrong else 0
