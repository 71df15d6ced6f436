"""The training step against closed forms. The expected side uses numbers and formulas written here, never ours."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers.config.options import OPTIONS, ObjectiveOptions
from helpers.data.draws import StepDraws
from helpers.errors import ConfigError
from helpers.objectives.diffusion import Diffusion, min_snr_weight, trained_timesteps

SDXL_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


def diffusion(**options: object) -> Diffusion:
    return Diffusion(dataclasses.replace(ObjectiveOptions(), **options), SDXL_SCHEDULE)


def draws(samples: int = 4, step: int = 7) -> StepDraws:
    return StepDraws(seed=1, step=step, places=tuple(range(samples)), step_samples=samples)


def alphas_cumprod() -> torch.Tensor:
    """The SD schedule, in float64: betas linear in their square root."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


LATENTS = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_schedule_is_the_one_of_stable_diffusion() -> None:
    assert torch.allclose(diffusion().alphas_cumprod.double(), alphas_cumprod(), rtol=1e-4)
    assert diffusion().alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_exact_answer_has_no_loss_and_recovers_the_latents(prediction_type: str) -> None:
    objective = diffusion(prediction_type=prediction_type)
    corrupted = objective.corrupt(LATENTS, draws())
    assert objective.loss(corrupted.target, corrupted).tolist() == [0.0] * 4
    kept = alphas_cumprod()[corrupted.timesteps].view(-1, 1, 1, 1)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    noisy, target = corrupted.noisy.double(), corrupted.target.double()
    recovered = (noisy - s * target) / a if prediction_type == "epsilon" else a * noisy - s * target
    assert torch.allclose(recovered, LATENTS.double(), atol=2e-3)


def test_losses_of_the_parametrisations_differ_by_the_signal_to_noise_ratio() -> None:
    """eps-MSE = S x0-MSE and v-MSE = (S + 1) x0-MSE: at t = 400 S is 0.737568."""
    kept = alphas_cumprod()[400]
    a, s = kept.sqrt(), (1 - kept).sqrt()
    generator = torch.Generator().manual_seed(3)
    x0, noise, error = (torch.randn(64, dtype=torch.float64, generator=generator) for _ in range(3))
    noisy = a * x0 + s * noise
    wrong_x0 = x0 + 0.1 * error
    wrong_noise = (noisy - a * wrong_x0) / s
    x0_mse = ((wrong_x0 - x0) ** 2).mean()
    noise_mse = ((wrong_noise - noise) ** 2).mean()
    v_mse = (((a * wrong_noise - s * wrong_x0) - (a * noise - s * x0)) ** 2).mean()
    assert (noise_mse / x0_mse).item() == pytest.approx(0.737568, abs=1e-6)
    assert (v_mse / x0_mse).item() == pytest.approx(1.737568, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", {0: 0.004254, 100: 0.591445, 250: 1.0, 999: 1.0}),
        ("v_prediction", {0: 0.004250, 100: 0.528884, 250: 0.673792, 500: 0.276332, 999: 0.004660}),
    ],
)
def test_min_snr_weights_are_those_of_the_paper(prediction_type: str, expected: dict[int, float]) -> None:
    weights = min_snr_weight(alphas_cumprod(), 5.0, prediction_type)
    for timestep, weight in expected.items():
        assert weights[timestep].item() == pytest.approx(weight, abs=5e-6), timestep


def test_min_snr_weighs_each_sample_of_the_loss() -> None:
    plain, weighted = diffusion(), diffusion(loss_weighting="min_snr", snr_gamma=5.0)
    corrupted, corrupted_weighted = plain.corrupt(LATENTS, draws()), weighted.corrupt(LATENTS, draws())
    snr = alphas_cumprod()[corrupted.timesteps] / (1 - alphas_cumprod()[corrupted.timesteps])
    ratio = weighted.loss(LATENTS, corrupted_weighted).double() / plain.loss(LATENTS, corrupted).double()
    assert torch.allclose(ratio, snr.clamp(max=5) / snr, rtol=1e-3)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start() -> None:
    objective = diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True, loss_weighting="min_snr", snr_gamma=5.0)
    assert objective.alphas_cumprod[-1].item() == 0.0
    assert objective.alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-6)
    assert min_snr_weight(objective.alphas_cumprod.double(), 5.0, "v_prediction")[-1].item() == 0.0


def test_zero_terminal_snr_with_epsilon_is_refused() -> None:
    with pytest.raises(ConfigError, match="v_prediction"):
        diffusion(rescale_betas_zero_snr=True)


def test_the_models_own_schedule_holds_unless_the_user_says_otherwise() -> None:
    ends_in_noise = {**SDXL_SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert Diffusion(ObjectiveOptions(), ends_in_noise).alphas_cumprod[-1].item() == 0.0
    usual = dataclasses.replace(ObjectiveOptions(), prediction_type="epsilon", rescale_betas_zero_snr=False)
    objective = Diffusion(usual, ends_in_noise)
    assert objective.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)
    assert objective.prediction_type == objective.scheduler_config["prediction_type"] == "epsilon"


def test_offset_noise_has_the_variance_of_its_formula() -> None:
    """The mean of a channel has variance 1/HW + a^2 = 0.013906 for 16 x 16 and a = 0.1; each sample has an offset of its own."""
    objective = diffusion(offset_noise=True, noise_offset=0.1, noise_offset_probability=1.0)
    many = torch.zeros(500, 4, 16, 16)
    noise = objective.corrupt(many, draws(500)).target
    assert noise.mean(dim=(2, 3)).var().item() == pytest.approx(1 / 256 + 0.01, rel=0.1)
    assert noise.var().item() == pytest.approx(1.01, rel=0.02)


def test_offset_noise_is_given_in_its_share_of_the_steps() -> None:
    with_offset, without = diffusion(offset_noise=True, noise_offset=1.0, noise_offset_probability=0.25), diffusion()
    given = sum(
        not torch.equal(with_offset.corrupt(LATENTS[:1], draws(1, step)).noisy, without.corrupt(LATENTS[:1], draws(1, step)).noisy)
        for step in range(400)
    )
    assert abs(given - 100) < 3 * math.sqrt(400 * 0.25 * 0.75)


def test_input_perturbation_leaves_the_target_alone() -> None:
    plain, perturbed = diffusion().corrupt(LATENTS, draws()), diffusion(input_perturbation=0.1).corrupt(LATENTS, draws())
    assert torch.equal(plain.target, perturbed.target)
    assert not torch.equal(plain.noisy, perturbed.noisy)


def test_timesteps_of_a_step_lie_in_different_strata() -> None:
    timesteps = diffusion().corrupt(torch.zeros(8, 4, 2, 2), draws(8)).timesteps
    assert sorted((timesteps // 125).tolist()) == list(range(8))


def test_timesteps_are_uniform_over_many_steps_and_no_place_is_favoured() -> None:
    objective = diffusion()
    chosen = torch.stack([objective.corrupt(torch.zeros(4, 1, 1, 1), draws(4, step)).timesteps for step in range(1500)]).float()
    assert chosen.min() >= 0
    assert chosen.max() <= 999
    for place in range(4):
        assert chosen[:, place].mean().item() == pytest.approx(499.5, abs=3 * 288.7 / math.sqrt(1500))


def test_a_sample_gets_the_same_noise_and_timestep_wherever_it_is_computed() -> None:
    """The step's samples together, or one by one as on other processes: the same numbers."""
    objective = diffusion(offset_noise=True, noise_offset_probability=0.5)
    together = objective.corrupt(LATENTS, draws(4))
    for place in range(4):
        alone = objective.corrupt(LATENTS[place : place + 1], StepDraws(1, 7, (place,), 4))
        assert torch.equal(alone.noisy[0], together.noisy[place])
        assert alone.timesteps[0] == together.timesteps[place]


# -- the part of the schedule that is trained -------------------------------------------------------------------------------


def judged(**settings: object) -> list[str]:
    return list(Diffusion.facts.judge({**{name: item.default for name, item in OPTIONS.items()}, **settings}))


@pytest.mark.parametrize(("strength", "border"), [(0.2, 200), (0.35, 350), (0.001, 1), (0.999, 999)])
def test_two_experts_share_the_schedule_without_overlap_or_gap(strength: float, border: int) -> None:
    experts = [
        trained_timesteps(
            ObjectiveOptions(refiner_training=True, refiner_training_strength=strength, refiner_training_invert_schedule=inverted), 1000
        )
        for inverted in (False, True)
    ]
    assert experts == [range(border), range(border, 1000)]


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize(("inverted", "low", "high"), [(False, 0, 199), (True, 200, 999)])
def test_an_expert_sees_its_own_timesteps_only_and_all_of_them(samples: int, inverted: bool, low: int, high: int) -> None:
    """At any number of samples in a step, and one from each of as many equal strata."""
    objective = diffusion(refiner_training=True, refiner_training_invert_schedule=inverted)
    seen = set()
    for step in range(2000 // samples):
        timesteps = objective.corrupt(torch.zeros(samples, 1, 1, 1), draws(samples, step)).timesteps
        seen.update(timesteps.tolist())
        strata = (timesteps - low) * samples // (high - low + 1)
        assert sorted(strata.tolist()) == list(range(samples))
    assert low <= min(seen) <= low + 4
    assert high - 4 <= max(seen) <= high


def test_the_whole_schedule_is_trained_by_default_and_by_a_refiner_that_is_asked_to() -> None:
    assert diffusion().timesteps == range(1000)
    assert diffusion(refiner_training=True, sdxl_refiner_uses_full_range=True).timesteps == range(1000)


def test_a_part_without_timesteps_is_refused() -> None:
    with pytest.raises(ConfigError, match="refiner_training_strength=0.0001 leaves no timestep"):
        diffusion(refiner_training=True, refiner_training_strength=0.0001)
    [problem] = judged(refiner_training=True, refiner_training_strength=1.0, refiner_training_invert_schedule=True)
    assert "leaves nothing" in problem


def test_settings_of_a_part_that_is_not_trained_are_refused() -> None:
    assert judged(refiner_training=True, refiner_training_strength=0.3, refiner_training_invert_schedule=True) == []
    assert judged(refiner_training_strength=0.3) == ["--refiner_training_strength needs --refiner_training."]
    assert judged(refiner_training_invert_schedule=True) == ["--refiner_training_invert_schedule needs --refiner_training."]
    [problem] = judged(refiner_training=True, sdxl_refiner_uses_full_range=True)
    assert "exclude each other" in problem
