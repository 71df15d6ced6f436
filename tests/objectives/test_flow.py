"""Flow matching against closed forms. The expected side uses numbers and formulas written here, never ours."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from helpers.choices import known_axes
from helpers.config.options import ObjectiveOptions
from helpers.data.base.draws import StepDraws
from helpers.objectives.flow import FlowMatching, shifted, timesteps

OPTIONS = known_axes().options

SD3_SCHEDULE = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
LATENTS = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
MANY = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # as many equally likely parts


def flow(**options: Any) -> FlowMatching:
    return FlowMatching(dataclasses.replace(ObjectiveOptions(), **options), SD3_SCHEDULE)


def draws(samples: int = 4, step: int = 7) -> StepDraws:
    return StepDraws(seed=1, step=step, places=tuple(range(samples)), step_samples=samples)


def spread(scheme: str, **options: float) -> torch.Tensor:
    return timesteps(MANY, dataclasses.replace(ObjectiveOptions(), weighting_scheme=scheme, **options))


def share(drawn: torch.Tensor, low: float, high: float) -> float:
    return ((drawn > low) & (drawn < high)).double().mean().item()


def test_the_exact_answer_has_no_loss_and_leads_back_to_the_picture() -> None:
    objective = flow()
    corrupted = objective.corrupt(LATENTS, draws())
    assert objective.loss(corrupted.target, corrupted).tolist() == [0.0] * 4
    sigma = (corrupted.timesteps / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(corrupted.noisy - sigma * corrupted.target, LATENTS, atol=1e-5)
    noise = draws().normal("noise", 16, 8, 8)
    assert torch.allclose(corrupted.target, noise - LATENTS)
    assert corrupted.weight.tolist() == [1.0] * 4


def test_the_error_of_the_picture_is_sigma_squared_times_that_of_the_velocity() -> None:
    """So its weight 1 / sigma^2 (sigma_sqrt) gives the velocity's loss as it is, and without it 0.09 of it at sigma 0.3."""
    corrupted = flow().corrupt(LATENTS, draws())
    corrupted = dataclasses.replace(corrupted, timesteps=torch.full((4,), 300.0))
    answer = corrupted.target + 0.1
    of_velocity = flow().loss(answer, corrupted)
    picture, right = corrupted.noisy - 0.3 * answer, corrupted.noisy - 0.3 * corrupted.target
    of_picture = ((picture - right) ** 2).mean(dim=(1, 2, 3))
    assert (of_picture / of_velocity).tolist() == pytest.approx([0.09] * 4, rel=1e-4)
    assert OPTIONS["weighting_scheme"].parse("sigma_sqrt") == "uniform"


def test_logit_normal_timesteps_have_the_numbers_of_their_distribution() -> None:
    drawn = spread("logit_normal")
    assert drawn.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert drawn.std().item() == pytest.approx(0.208, abs=5e-4)
    assert [drawn.quantile(q).item() for q in (0.05, 0.95)] == pytest.approx([0.162, 0.838], abs=5e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.5, 2.0)])
def test_the_median_and_spread_of_logit_normal_timesteps_are_set(mean: float, std: float) -> None:
    """Above 0 they are noisier: the median is sigmoid(m), and one deviation above it sigmoid(m + s)."""
    drawn = spread("logit_normal", logit_mean=mean, logit_std=std)
    expected = [1 / (1 + math.exp(-mean)), 1 / (1 + math.exp(-mean - std))]
    assert [drawn.quantile(q).item() for q in (0.5, 0.841345)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("scale", "in_the_middle"), [(1.29, 0.4595), (0.81, 0.3355), (-0.5, 0.1566), (0.0, 0.2)])
def test_mode_prefers_the_middle_above_0_and_the_ends_below(scale: float, in_the_middle: float) -> None:
    drawn = spread("mode", mode_scale=scale)
    assert share(drawn, 0.4, 0.6) == pytest.approx(in_the_middle, abs=5e-4)
    assert drawn.min() >= 0 and drawn.max() <= 1


def test_cosmap_is_a_density_of_timesteps() -> None:
    """2 / (pi - 2 pi t + 2 pi t^2): 0.6366 at the ends and 1.2732 in the middle, and it adds up to 1."""

    def density(t: float) -> float:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)

    assert (density(0), density(0.5)) == pytest.approx((0.6366, 1.2732), abs=1e-4)
    drawn = spread("cosmap")
    for low in (0.0, 0.1, 0.45, 0.9):
        middle = [density(low + (k + 0.5) / 10_000) for k in range(1000)]
        assert share(drawn, low, low + 0.1) == pytest.approx(sum(middle) / 10_000, abs=1e-4)


def test_uniform_timesteps_are_uniform() -> None:
    assert torch.equal(spread("uniform"), MANY)


def test_the_shift_is_that_of_the_paper() -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert shifted(t, 3.0).tolist() == pytest.approx([0.25, 0.5, 0.75, 0.9, 0.9643], abs=1e-4)
    assert torch.allclose(shifted(shifted(t, 3.0), 1 / 3), t)
    assert torch.equal(shifted(t, 1.0), t)


def test_network_and_sampler_use_the_shifted_timesteps() -> None:
    """The models' own shift of 3, or another; once, in the noise and in the timestep alike."""
    by_shift = {shift: flow(weighting_scheme="uniform", flow_shift=shift) for shift in (None, 1.0, 6.0)}
    plain = by_shift[1.0].corrupt(LATENTS, draws()).timesteps.double() / 1000
    for shift, objective in by_shift.items():
        a = shift or 3.0
        corrupted = objective.corrupt(LATENTS, draws())
        expected = (a * plain / (1 + (a - 1) * plain)).float()
        assert torch.allclose(corrupted.timesteps, 1000 * expected, rtol=1e-5)
        noise = draws().normal("noise", 16, 8, 8)
        seen = ((corrupted.noisy - LATENTS) / (noise - LATENTS)).flatten(1).median(dim=1).values
        assert torch.allclose(seen, expected, atol=1e-4)
        assert objective.scheduler_config["shift"] == objective.identity["flow_shift"] == a


def test_the_network_gets_timesteps_in_float32() -> None:
    """In bfloat16 they would be multiples of four above 512, and half of a timestep off in the middle."""
    timesteps = flow().corrupt(torch.zeros(64, 1, 1, 1), draws(64)).timesteps
    assert timesteps.dtype == torch.float32
    exact = flow().sigmas(draws(64)) * 1000
    assert (timesteps.double() - exact).abs().max() < 1e-4
    assert (exact.bfloat16().double() - exact).abs().max() > 0.5


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap", "uniform"])
def test_a_step_has_one_timestep_of_each_equally_likely_part(scheme: str) -> None:
    objective = flow(weighting_scheme=scheme)
    edges = shifted(spread(scheme), 3.0).quantile(torch.arange(9, dtype=torch.float64) / 8)
    for step in range(20):
        sigmas = objective.sigmas(draws(8, step))
        assert sorted((torch.bucketize(sigmas, edges[1:-1])).tolist()) == list(range(8))


def test_no_place_of_a_step_is_favoured_and_the_whole_has_its_distribution() -> None:
    objective = flow(flow_shift=1.0)
    chosen = torch.stack([objective.sigmas(draws(4, step)) for step in range(1500)])
    for place in range(4):
        assert chosen[:, place].mean().item() == pytest.approx(0.5, abs=3 * 0.208 / math.sqrt(1500))
    assert chosen.std().item() == pytest.approx(0.208, abs=0.003)


def test_without_strata_every_timestep_is_drawn_by_itself() -> None:
    objective = flow(weighting_scheme="uniform", flow_shift=1.0, disable_segmented_timestep_sampling=True)
    chosen = torch.stack([objective.sigmas(draws(4, step)) for step in range(1000)])
    assert chosen.mean().item() == pytest.approx(0.5, abs=3 * 0.2887 / math.sqrt(4000))
    one_of_each = ((chosen * 4).long().sort(dim=1).values == torch.arange(4)).all(dim=1).double().mean().item()
    assert one_of_each == pytest.approx(24 / 256, abs=0.03)  # 4! / 4^4, where strata make it always
    assert objective.sigmas(StepDraws(1, 5, (2,), 4))[0] == chosen[5, 2]


def test_huber_is_square_below_delta_and_linear_above() -> None:
    objective = flow(loss="huber", huber_delta=0.5)
    corrupted = objective.corrupt(LATENTS, draws())
    for error, distance in ((0.1, 0.01), (0.5, 0.25), (-2.0, 0.5 * (2 * 2.0 - 0.5))):
        assert objective.loss(corrupted.target + error, corrupted).tolist() == pytest.approx([distance] * 4, rel=1e-4)


def test_a_sample_gets_the_same_noise_and_timestep_wherever_it_is_computed() -> None:
    together = flow().corrupt(LATENTS, draws(4))
    for place in range(4):
        alone = flow().corrupt(LATENTS[place : place + 1], StepDraws(1, 7, (place,), 4))
        assert torch.equal(alone.noisy[0], together.noisy[place])
        assert alone.timesteps[0] == together.timesteps[place]


DYNAMIC = {**SD3_SCHEDULE, "use_dynamic_shifting": True}


@pytest.mark.parametrize(("tokens", "shift"), [(1024, 1.88), (2304, 2.33), (4096, 3.16), (6889, 5.07)])  # 512^2, 768^2, 1024^2, 1328^2
def test_a_dynamic_shift_grows_with_the_image(tokens: int, shift: float) -> None:
    assert FlowMatching(ObjectiveOptions(), DYNAMIC).shift(tokens) == pytest.approx(shift, abs=0.005)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_one_that_the_scheduler_of_diffusers_samples_with(kind: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    schedule = {**DYNAMIC, "time_shift_type": kind, "max_shift": 1.3, "max_image_seq_len": 6400}
    theirs = FlowMatchEulerDiscreteScheduler.from_config(schedule)
    levels = [0.9, 0.5, 0.1]
    theirs.set_timesteps(sigmas=levels, mu=calculate_shift(600, 256, 6400, 0.5, 1.3))
    ours = shifted(torch.tensor(levels), FlowMatching(ObjectiveOptions(), schedule).shift(600))
    assert torch.allclose(ours, theirs.sigmas[:-1], rtol=1e-5)


def test_each_micro_batch_is_shifted_by_its_own_number_of_tokens() -> None:
    """Tokens are squares of `patch` latent pixels; the strata stay those of the step."""
    objective = FlowMatching(ObjectiveOptions(), DYNAMIC, patch=2)
    wide = objective.corrupt(torch.zeros(4, 16, 64, 96), draws())
    plain = FlowMatching(ObjectiveOptions(flow_shift=1.0), DYNAMIC).sigmas(draws())
    factor = math.exp(0.5 + (32 * 48 - 256) * 0.65 / 3840)
    assert torch.allclose(wide.timesteps.double() / 1000, factor * plain / (1 + (factor - 1) * plain), rtol=1e-5)
    assert objective.corrupt(torch.zeros(4, 16, 32, 32), draws()).timesteps.max() < wide.timesteps.max()


def test_a_shift_that_the_user_sets_replaces_a_dynamic_one_in_training_and_sampling() -> None:
    objective = FlowMatching(ObjectiveOptions(flow_shift=2.0), DYNAMIC)
    assert (objective.scheduler_config["shift"], objective.scheduler_config["use_dynamic_shifting"]) == (2.0, False)
    assert objective.shift(4096) == 2.0 and objective.identity == {"flow_shift": 2.0}
    assert FlowMatching(ObjectiveOptions(), DYNAMIC).identity != FlowMatching(ObjectiveOptions(), {**DYNAMIC, "max_shift": 1.2}).identity


def judged(**settings: object) -> list[str]:
    return list(FlowMatching.facts.judge({**{name: item.default for name, item in OPTIONS.items()}, **settings}))


@pytest.mark.parametrize(("scale", "refused"), [(-1.0, False), (1.7519, False), (-1.01, True), (1.76, True)])
def test_mode_scales_whose_function_turns_back_are_refused(scale: float, refused: bool) -> None:
    assert bool(judged(weighting_scheme="mode", mode_scale=scale)) == refused
    assert judged(mode_scale=scale) == []  # of no effect with another scheme
    drawn = spread("mode", mode_scale=scale)
    assert bool((drawn.diff() > 1e-9).any()) == refused


def test_a_sampler_of_diffusion_models_is_refused_with_a_reason() -> None:
    [problem] = judged(validation_noise_scheduler="ddim")
    assert problem.startswith("--validation_noise_scheduler=ddim") and len(problem.split()) > 7


def test_what_to_use_instead_is_named_for_options_of_diffusion_alone() -> None:
    """An option with `objective="diffusion"` is refused or left out when the settings are read (tests/config/test_read.py)."""
    assert {OPTIONS[name].objective for name in FlowMatching.facts.instead} == {"diffusion"}


def test_defaults_are_accepted_and_so_is_what_says_the_same() -> None:
    assert judged() == []
    assert judged(rescale_betas_zero_snr=False, validation_noise_scheduler="euler") == []
